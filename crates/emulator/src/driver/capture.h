// Recording what is submitted to a stream, and launching the record: CUDA graphs.
#pragma once

#include "stream.h"

namespace emulator {

// Ends the capture that the stream is part of without a result.
void abandon_capture(Stream& stream);

}  // namespace emulator
