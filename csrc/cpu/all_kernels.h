// All CPU kernels, for the instruction set of the including file. These headers have no include
// guards and are included once per instruction set, in this order: each uses those before it. See
// vec.h for the macros that the including file must define.
#include "vec.h"
#include "rows.h"
#include "gate.h"
#include "tail.h"
#include "gate_backward.h"
#include "passes.h"
#include "norm_rows.h"
#include "norm.h"
