// Thin PTX wrappers, one instruction or idiom a function, for sm_90a. This folder includes nothing else of the library.
#pragma once
#include "copy.cuh"
#include "mbarrier.cuh"
#include "sync.cuh"
#include "wgmma.cuh"
