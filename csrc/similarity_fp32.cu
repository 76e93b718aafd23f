#include "similarity.cuh"

template struct fusedloss::Similarities<float>;
