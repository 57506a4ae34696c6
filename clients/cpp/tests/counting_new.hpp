#pragma once

#include <cstdint>

/// Calls of operator new by this thread so far. Linking counting_new.cpp replaces operator new by one that counts.
std::int64_t allocations_of_this_thread();
