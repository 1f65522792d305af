// The CPU kernels for the compiler's baseline instruction set.
#include "kernels.h"

#define PSA_NAMESPACE baseline
#define PSA_VECTOR_BYTES 16
#include "all_kernels.h"
