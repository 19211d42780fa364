// The extension of one level of the instruction set: `_base`, `_v3` or `_v4`, by the name of the target.
#include <pthread.h>

#include "bind.hpp"
#include "threads.hpp"

std::atomic<bool> srm::forked{false};

NB_MODULE(SRM_NAME, m) {
    pthread_atfork(nullptr, nullptr, [] { srm::forked = true; });
    srm::bind_scan(m);
    srm::bind_mix(m);
    srm::bind_mdi(m);
    srm::bind_mdi_recurrence(m);
    srm::bind_lstm(m);
    srm::bind_attention(m);
}
