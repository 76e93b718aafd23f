#include "similarity.cuh"

template struct fusedloss::Similarities<fusedloss::bf16>;
