// The table of launches: which instances of the two kernels there are. similarity_*.cu compile one number format each.
#pragma once

#include <cstring>
#include <type_traits>

#include "similarity_sm80.cuh"

// Every instance; those of which exponentials are stored have fp32's range.
#define FUSEDLOSS_EPILOGUES(X)                                                                                      \
  X(Stats<false, false>) X(Stats<false, true>) X(Stats<true, true>) X(Grad<false, false, false>)                    \
  X(Grad<false, false, true>) X(Grad<false, true, false>) X(Grad<false, true, true>) X(Grad<true, true, true>)      \
  X(Top) X(Opposed) X(Pick) X(Guide) X(Store)
#define FUSEDLOSS_EPILOGUES_OF_RANGE(X)                                                                             \
  X(Exp<false, false>) X(Exp<false, true>) X(Exp<true, true>) X(Fold<FoldKind::sigmoid, false>)                     \
  X(Fold<FoldKind::margin_ranking, false>) X(Fold<FoldKind::pair_hinge, false>) X(Fold<FoldKind::pair_hinge, true>) \
  X(SidesStats<SideKind::linear, false>) X(SidesStats<SideKind::linear, true>)                                      \
  X(SidesStats<SideKind::circle, false>) X(SidesStats<SideKind::circle, true>)                                      \
  X(SidesGrad<SideKind::linear, false>) X(SidesGrad<SideKind::linear, true>)                                        \
  X(SidesGrad<SideKind::circle, false>) X(SidesGrad<SideKind::circle, true>)

namespace fusedloss {

// Masks, a softcap, a tally, smoothing: whatever only the general instance knows.
inline bool general(const Strip& strip, bool more) {
  static const Masks none{};
  return more || strip.softcap > 0 || std::memcmp(&strip.masks, &none, sizeof(Masks)) != 0;
}

// In similarity_sm90_*.cu, which are compiled for sm_90a alone.
template <class T, class Epilogue>
cudaError_t run_sm90(const Strip& strip, const typename Epilogue::Args& args, const Plan& plan, cudaStream_t stream);

template <class T, class Epilogue>
cudaError_t run(const Strip& strip, const typename Epilogue::Args& args, const Plan& plan, cudaStream_t stream) {
#if FUSEDLOSS_SM90A
  if (plan.capability == 90) return run_sm90<T, Epilogue>(strip, args, plan, stream);
#endif
  if (plan.capability != 80) return cudaErrorNotSupported;
  return sm80::launch_similarity<T, Epilogue>(strip, args, stream);
}

template <class T>
constexpr bool kHasRange = !std::is_same_v<T, fp16>;

template <class T>
cudaError_t Similarities<T>::stats(const Strip& strip, const StatsArgs& args, const Plan& plan, cudaStream_t stream) {
  if (general(strip, args.tally.score)) return run<T, Stats<true, true>>(strip, args, plan, stream);
  if (args.col_max) return run<T, Stats<false, true>>(strip, args, plan, stream);
  return run<T, Stats<false, false>>(strip, args, plan, stream);
}

template <class T>
cudaError_t Similarities<T>::exp(const Strip& strip, const ExpArgs& args, const Plan& plan, cudaStream_t stream) {
  if (!strip.out) return cudaErrorInvalidValue;
  if constexpr (kHasRange<T>) {
    if (general(strip, args.tally.score)) return run<T, Exp<true, true>>(strip, args, plan, stream);
    if (args.col_sum) return run<T, Exp<false, true>>(strip, args, plan, stream);
    return run<T, Exp<false, false>>(strip, args, plan, stream);
  }
  return cudaErrorNotSupported;
}

template <class T>
cudaError_t Similarities<T>::grad(const Strip& strip, const GradArgs& args, const Plan& plan, cudaStream_t stream) {
  if (!strip.out) return cudaErrorInvalidValue;
  if (general(strip, args.smooth)) return run<T, Grad<true, true, true>>(strip, args, plan, stream);
  if (args.col_shift && args.q) return run<T, Grad<false, true, true>>(strip, args, plan, stream);
  if (args.col_shift) return run<T, Grad<false, true, false>>(strip, args, plan, stream);
  if (args.q) return run<T, Grad<false, false, true>>(strip, args, plan, stream);
  return run<T, Grad<false, false, false>>(strip, args, plan, stream);
}

template <class T>
cudaError_t Similarities<T>::top(const Strip& strip, const TopArgs& args, const Plan& plan, cudaStream_t stream) {
  return run<T, Top>(strip, args, plan, stream);
}
template <class T>
cudaError_t Similarities<T>::opposed(const Strip& strip, const OpposedArgs& args, const Plan& plan,
                                     cudaStream_t stream) {
  return run<T, Opposed>(strip, args, plan, stream);
}
template <class T>
cudaError_t Similarities<T>::pick(const Strip& strip, const PickArgs& args, const Plan& plan, cudaStream_t stream) {
  return run<T, Pick>(strip, args, plan, stream);
}
template <class T>
cudaError_t Similarities<T>::guide(const Strip& strip, const BitsArgs& args, const Plan& plan, cudaStream_t stream) {
  return run<T, Guide>(strip, args, plan, stream);
}
template <class T>
cudaError_t Similarities<T>::store(const Strip& strip, const StoreArgs& args, const Plan& plan, cudaStream_t stream) {
  if (!strip.out) return cudaErrorInvalidValue;
  return run<T, Store>(strip, args, plan, stream);
}

// Folds are not for fp16.
template <class T, class Epilogue>
cudaError_t run_fold(const Strip& strip, const typename Epilogue::Args& args, const Plan& plan, cudaStream_t stream) {
  if constexpr (kHasRange<T>) return run<T, Epilogue>(strip, args, plan, stream);
  return cudaErrorNotSupported;
}
template <class T>
cudaError_t Similarities<T>::sigmoid(const Strip& strip, const FoldArgs& args, const Plan& plan, cudaStream_t stream) {
  return run_fold<T, Fold<FoldKind::sigmoid, false>>(strip, args, plan, stream);
}
template <class T>
cudaError_t Similarities<T>::margin_ranking(const Strip& strip, const FoldArgs& args, const Plan& plan,
                                            cudaStream_t stream) {
  return run_fold<T, Fold<FoldKind::margin_ranking, false>>(strip, args, plan, stream);
}
// EPILOGUE<KIND, COLUMNS>. GIVEN: of the columns as rows, which the launch is told or not.
#define FUSEDLOSS_FOLD(NAME, ARGS, EPILOGUE, KIND, GIVEN)                                                          \
  template <class T>                                                                                             \
  cudaError_t Similarities<T>::NAME(const Strip& strip, const ARGS& args, const Plan& plan, cudaStream_t stream) { \
    if (args.GIVEN) return run_fold<T, EPILOGUE<KIND, true>>(strip, args, plan, stream);                         \
    return run_fold<T, EPILOGUE<KIND, false>>(strip, args, plan, stream);                                        \
  }
FUSEDLOSS_FOLD(pair_hinge, FoldArgs, Fold, FoldKind::pair_hinge, col_weight)
FUSEDLOSS_FOLD(sides_stats, SidesArgs, SidesStats, SideKind::linear, col_pull_max)
FUSEDLOSS_FOLD(sides_grad, SidesArgs, SidesGrad, SideKind::linear, col_pull_weight)
FUSEDLOSS_FOLD(circle_stats, SidesArgs, SidesStats, SideKind::circle, col_pull_max)
FUSEDLOSS_FOLD(circle_grad, SidesArgs, SidesGrad, SideKind::circle, col_pull_weight)
#undef FUSEDLOSS_FOLD

}  // namespace fusedloss
