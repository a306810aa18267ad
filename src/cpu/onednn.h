// oneDNN's matmul primitive, called from one thread at a time per thread. The library is found at run time (dlopen), apart from any
// other copy of oneDNN in the process: libtorch carries its own.
#pragma once
#include <string>

#include "cpu/gemm.h"

namespace machmoe::cpu::onednn {

bool available();
std::string description();  // version, or why it is not there
void matmul(const Gemm&);   // F32 or BF16

}  // namespace machmoe::cpu::onednn
