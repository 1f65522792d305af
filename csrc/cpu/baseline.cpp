// The CPU kernels for baseline.
#include "kernels.h"

#define PSA_NAMESPACE baseline
#define PSA_VECTOR_BYTES 16
#include "vec.h"
#include "rows.h"
#include "gate.h"
#include "tail.h"
#include "gate_backward.h"
#include "passes.h"
#include "norm_rows.h"
#include "norm.h"
