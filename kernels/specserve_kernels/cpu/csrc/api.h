// Marks the functions that Python calls by ctypes. Their arguments are numbers and the addresses of
// arrays and structures, which the Python modules of cpu/ check before the call.
#pragma once

#define SPECSERVE_API extern "C" __attribute__((visibility("default")))
