#include "nearest_codebook_launch.cuh"

template void ldm_fast::nearest::enqueue(Problem<__nv_bfloat16>, Workspace&, int, Launcher&);
