// Reading an integer whose width is known only at run time: 4 or 8 bytes.
#pragma once

inline long integer_at(device const void* integers, long bytes, long at) {
  return bytes == 4 ? long(static_cast<device const int*>(integers)[at]) : static_cast<device const long*>(integers)[at];
}
