#include "nearest_codebook_launch.cuh"

template void ldm_fast::nearest::enqueue(Problem<float>, Workspace&, int, Launcher&);
