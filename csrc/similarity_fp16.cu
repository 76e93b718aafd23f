#include "similarity.cuh"

template struct fusedloss::Similarities<fusedloss::fp16>;
