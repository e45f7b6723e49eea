// How attention over a packed batch is divided among threads. Compiled for any processor.
#include <algorithm>
#include <cstdlib>

#include "kernels.h"

namespace fastencoder {

Task* tasks_of(const int32_t* offsets, int64_t sequences, int64_t left, int64_t right, int64_t* count) {
    int64_t n = 0;
    for (int64_t b = 0; b < sequences; b++) n += (offsets[b + 1] - offsets[b] + kQueries - 1) / kQueries;
    Task* tasks = static_cast<Task*>(std::malloc(std::max<int64_t>(n, 1) * sizeof(Task)));
    if (!tasks) return nullptr;
    Task* next = tasks;
    for (int64_t b = 0; b < sequences; b++) {
        int64_t length = offsets[b + 1] - offsets[b];
        for (int64_t first = 0; first < length; first += kQueries) {
            int64_t end = std::min(first + kQueries, length);
            int64_t low = left < 0 ? 0 : std::max<int64_t>(0, first - left);
            int64_t high = right < 0 ? length : std::min(length, end + right);
            *next++ = {b, first, end, low, high};
        }
    }
    // Long ones first, so that the threads end at the same time.
    auto cost = [](const Task& t) { return (t.end - t.first) * (t.high - t.low); };
    std::sort(tasks, next, [&](const Task& x, const Task& y) { return cost(x) > cost(y); });
    *count = n;
    return tasks;
}

}  // namespace fastencoder
