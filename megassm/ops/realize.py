"""The bank of K spectral filters as one linear state-space model with S states: no FFT, decoding in constant memory.

    step   f_k = q_k x + phi_k(0) u                 x' = A1 x + b u        x: inputs strictly before the current one
    chunk  F_c = T U_c + Q x_c                      x_{c+1} = A x_c + B U_c
           A = A1^C,  B[:, m] = A1^(C-1-m) b,  Q[i] = q A1^i,  T[i, k, m] = phi_k(i-m) for i >= m, else 0

The same x serves both forms, so decoding can start where a prefill ended (SpectraLDS does this by regression).

A short state exists because phi_k is a sum of decaying exponentials and the K filters share their few directions. The
block Hankel matrix of the continued filters, damped, is cut off where its singular values fall below tolerance,

    H[(i, k), j] = g^(i+j) phi_k(i+j+1) = U diag(s) W^T,   A1 = s^-1/2 U^T H_shifted W s^-1/2   (Ho & Kalman; ERA),

with i, j in [0, L) sampled geometrically (square root of the gap as weight). The balanced scaling keeps every entry of
A, B and Q near 1. The damping g = exp(-alpha / L) matters: only ages below L occur in a sequence of length L, while the
continued filters are by far largest beyond it (see `extended_filters`); undamped, they spend the precision there.

A's eigenvalues come within 1e-6 of 1, and float32 has 6e-8: rounding A itself would be the largest error of long
sequences. So A's powers are formed in float64 (`chunk_states`), and a step adds (A1 - I) x to x.

Nothing is believed unmeasured: a candidate is taken only if its spectral radius is below 1 and if, on white noise of
length L, both forms in float32 reproduce every channel. For more than 3.2 log2(L) channels none does so, or one on one
processor and none on another (K = 32 at L = 512): the state is then the last L-1 inputs themselves: exact, and 0 beyond
L. Measured for K = 32, C = 64, the worst channel:

    L                            256    512   1024    2048    8192   65,536  262,144  1,048,576
    S                            255    511     43      44      47       52       56         59
    error, float64                 0      0   4e-8    3e-8    2e-8     1e-8     2e-9       2e-9
    error, float32, by doubling 2e-7   2e-7   8e-7    4e-7    4e-7     5e-7     4e-7       6e-7
    error, float32, one by one  2e-7   2e-7   8e-7    6e-7    3e-7     1e-6     7e-7       2e-6
    off the continuation to 2L     1      1   1e-3    1e-3    2e-4     2e-5                       (of its largest value)
    off the continuation to 4L     1      1   2e-2    1e-1    3e-2     3e-3

Bases with signs have eigenvalues near -1 too, and a model made of one that has none (`megassm.ops.steps`): a step adds
(A1 - J) x to J x, J being diagonal, 1 and -1, and a chunk of even length has J^C = 1. With J = 1 steps of 2,047
positions err two to three times as much in float32. For more than 3 log2(L) channels of a sign, log2(L/2) with
hankel_l, no short state is looked for. Measured for K = 32: S, error in float32 by doubling and one by one:

    L                       1024              2048              8192            65,536
    alternating   54, 3e-7, 3e-7    58, 3e-7, 4e-7    64, 4e-7, 3e-7    74, 4e-7, 4e-7
    hankel_l      52, 3e-7, 2e-7    56, 4e-7, 5e-7    62, 4e-7, 5e-7    72, 4e-7, 1e-6

The choice among candidates turns on rounding: two machines with other BLAS libraries may hold different states for the
same filters. A state is only good with the model that made it; where several processes share one, share the model too.

Shapes: L sequence length, K channels, C chunk, S states, J sampled ages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.fft import irfft, next_fast_len, rfft
from scipy.linalg import svd

from megassm.config.model import Basis
from megassm.errors import UserError
from megassm.ops.bases import extended_filters, spectral_filters
from megassm.ops.hankel import Array, read_arrays, write_arrays
from megassm.ops.hankel import cache_path as hankel_path
from megassm.ops.steps import Step, interleaved, mirrored, pair_responses

ALGORITHM = "damped Ho-Kalman, geometric ages; tried by doubling and one by one in float32; version 4"
TOLERANCE = 4e-6
SAMPLES_PER_OCTAVE = 24
DAMPING = (6.5, 5.0, 4.0, 3.0, 2.0, 1.0)  # alpha, in the order tried: stability differs, by luck of rounding
CUTOFFS = (1e-8, 1e-7, 1e-6)  # of singular values; the filters have norm 1
SHIFT_REGISTER_LIMIT = 2048  # longest sequence whose state may be its last L-1 inputs: Q takes C * K * L numbers
TRIAL_CHUNKS = (64, 16, 256, 32, 128)  # each model is tried in all, so that the state is the same whatever the chunk
CHANNELS_PER_OCTAVE = 3.2  # of L, up to which a short state is looked for: a candidate then passes on every processor
SIGNED_PER_OCTAVE = 3.0  # the same of the channels of either sign
STEP_TRIAL_CHUNK = 16  # the recurrence one after the other, as steps have it, at a sixteenth of their number


class Realization(NamedTuple):
    """Chunk form and step form over one state. float64; cast what a device needs, once."""

    transition_SS: Array
    input_SC: Array  # column m belongs to position m of the chunk
    toeplitz_CKC: Array
    output_CKS: Array
    step_transition_SS: Array
    step_input_S: Array
    step_output_KS: Array
    step_direct_K: Array
    step_signs_S: Array
    """J's diagonal: what a step's transition is near to."""


def realize(
    seq_len: int, num_channels: int, chunk: int, basis: Basis = "plus", tolerance: float = TOLERANCE
) -> Realization:
    """The filters of `spectral_filters(seq_len, num_channels, basis)` as a state-space model in chunks of C steps.

    Args:
        seq_len: L, the length the filters are derived for. Within L the model agrees with them to `tolerance`.
        num_channels: K <= L.
        chunk: C, any positive length; beyond L the Toeplitz block continues with the model's own response.
        basis: which filters.
        tolerance: largest relative error of a channel's output on white noise of length L in float32 arithmetic.

    Raises:
        UserError: chunk not positive, sizes `spectral_filters` refuses, or no model within tolerance above L = 2048.
    """
    if chunk < 1:
        raise UserError(f"chunk = {chunk}: must be at least 1 step")
    _, phi_LK = spectral_filters(seq_len, num_channels, basis)
    step = _short_step(seq_len, num_channels, basis, tolerance)
    if step is not None:
        return _in_chunks(step, phi_LK, chunk)
    if seq_len > SHIFT_REGISTER_LIMIT:
        raise UserError(
            f"num_channels = {num_channels} for seq_len = {seq_len}: no state-space model reproduces these filters to "
            f"{tolerance:g} in float32; lower num_channels, raise tolerance or convolve by FFT"
        )
    return _in_chunks(_shift_register(phi_LK), phi_LK, chunk)


def _short_step(seq_len: int, num_channels: int, basis: Basis, tolerance: float) -> Step | None:
    """The first candidate within tolerance, or None; either is found once per machine and cached on disk."""
    own = "" if basis == "plus" else f"{basis}; "
    path = hankel_path(seq_len, num_channels, f"realize; {ALGORITHM}; {own}tolerance={tolerance!r}")
    cached = read_arrays(path)
    if cached is None or (cached and set(cached) != set(Step._fields)):
        step = _find_short_step(seq_len, num_channels, basis, tolerance)
        cached = {} if step is None else step._asdict()
        write_arrays(path, cached)
    return Step(**cached) if cached else None


def _find_short_step(seq_len: int, num_channels: int, basis: Basis, tolerance: float) -> Step | None:
    """None also for so many channels that rounding would decide: one processor would find a state, another none."""
    if num_channels > _most_channels(seq_len, basis):
        return None
    trial = None
    for step in _candidates(seq_len, num_channels, basis):
        if len(step.input_S) >= seq_len - 1 or np.abs(np.linalg.eigvals(step.transition_SS)).max() >= 1:
            continue
        trial = trial or _trial(spectral_filters(seq_len, num_channels, basis)[1])  # its FFTs take seconds
        if _is_faithful(step, trial, tolerance):
            return step
    return None


def _most_channels(seq_len: int, basis: Basis) -> float:
    match basis:
        case "plus":
            return CHANNELS_PER_OCTAVE * math.log2(seq_len)
        case "alternating":
            return 2 * math.floor(SIGNED_PER_OCTAVE * math.log2(seq_len))
        case "hankel_l":
            return 2 * math.floor(SIGNED_PER_OCTAVE * math.log2(seq_len / 2))


def _candidates(seq_len: int, num_channels: int, basis: Basis) -> Iterator[Step]:
    """Models of growing state, for one damping after the other."""
    if seq_len < 2:
        return
    half = (num_channels + 1) // 2
    match basis:
        case "plus":
            yield from _unsigned(extended_filters(seq_len, num_channels, 2 * seq_len + 1))
        case "alternating":
            for step in _unsigned(extended_filters(seq_len, half, 2 * seq_len + 1)):
                yield mirrored(step, num_channels)
        case "hankel_l":
            for step in _unsigned(pair_responses(seq_len, num_channels)):
                yield interleaved(step, num_channels)


def _unsigned(continued: Array) -> Iterator[Step]:
    """Models of the filters (2 L + 1, K), which are sums of decays without sign; their first row is not read."""
    seq_len = len(continued) // 2
    ages_J, weight_J = _sample_ages(seq_len)
    for alpha in DAMPING:
        damped_J = weight_J * np.exp(-alpha / seq_len * ages_J)

        def hankel(shift: int, damped_J: Array = damped_J) -> Array:
            blocks = continued[ages_J[:, None] + ages_J + shift].transpose(0, 2, 1)
            return np.asarray((blocks * damped_J[:, None, None] * damped_J).reshape(-1, len(ages_J)))

        left, singular, right = svd(hankel(1), full_matrices=False, check_finite=False)
        one_step = left.T @ hankel(2) @ right.T
        first = (continued[ages_J + 1] * damped_J[:, None]).reshape(-1)
        outputs_KJ = (continued[ages_J + 1] * damped_J[:, None]).T
        sizes = [max(1, int((singular > cutoff).sum())) for cutoff in CUTOFFS]
        for size in dict.fromkeys(sizes):
            root_S = np.sqrt(singular[:size])
            yield Step(
                one_step[:size, :size] / root_S[:, None] / root_S,
                left[:, :size].T @ first / root_S,
                outputs_KJ @ right[:size].T / root_S,
                np.ones(size),
            )


def _sample_ages(seq_len: int) -> tuple[npt.NDArray[np.int64], Array]:
    """Ages in [0, L): all of the first, then every second, every fourth, ..; and the square root of the gaps."""
    ages: list[int] = []
    gap = 1
    while not ages or ages[-1] + gap < seq_len:
        begin = ages[-1] + gap if ages else 0
        ages += range(begin, min(seq_len, begin + SAMPLES_PER_OCTAVE * gap), gap)
        gap *= 2
    ages_J = np.array(ages)
    return ages_J, np.sqrt(np.diff(np.append(ages_J, seq_len)))


def _shift_register(phi_LK: Array) -> Step:
    """The state is the last L-1 inputs, the newest first."""
    size = max(1, len(phi_LK) - 1)
    outputs_KS = np.zeros((phi_LK.shape[1], size))
    outputs_KS[:, : len(phi_LK) - 1] = phi_LK[1:].T
    return Step(np.eye(size, k=-1), np.eye(size)[0], outputs_KS, np.ones(size))


def _in_chunks(step: Step, phi_LK: Array, chunk: int) -> Realization:
    transition_SS, input_S, output_KS, signs_S = step
    inputs_CS = _powers(transition_SS, input_S, chunk)
    outputs_CKS = _powers(transition_SS.T, output_KS, chunk)
    response_CK = np.concatenate((phi_LK[:1], inputs_CS @ output_KS.T))[:chunk]
    response_CK[: len(phi_LK)] = phi_LK[:chunk]
    age_CC = np.arange(chunk)[:, None] - np.arange(chunk)
    toeplitz_CCK = np.where((age_CC >= 0)[..., None], response_CK[age_CC], 0.0)
    return Realization(
        transition_SS=np.linalg.matrix_power(transition_SS, chunk),
        input_SC=np.ascontiguousarray(inputs_CS[::-1].T),
        toeplitz_CKC=np.ascontiguousarray(toeplitz_CCK.transpose(0, 2, 1)),
        output_CKS=outputs_CKS,
        step_transition_SS=transition_SS,
        step_input_S=input_S,
        step_output_KS=output_KS,
        step_direct_K=phi_LK[0].copy(),
        step_signs_S=signs_S,
    )


def _powers(transition_SS: Array, start: Array, count: int) -> Array:
    """A^j start for j = 0 .. count-1, by doubling; vectors lie along start's last axis."""
    result = np.empty((count, *start.shape))
    result[0] = start
    done, power_SS = 1, transition_SS.T
    while done < count:
        fresh = min(done, count - done)
        result[done : done + fresh] = result[:fresh] @ power_SS
        done += fresh
        power_SS = power_SS @ power_SS
    return result


class _Trial(NamedTuple):
    """White noise, and what the filters make of it."""

    phi_LK: Array
    noise_L: Array
    exact_LK: Array


def _trial(phi_LK: Array) -> _Trial:
    length = len(phi_LK)
    noise_L = np.random.default_rng(0).standard_normal(length)
    size = next_fast_len(2 * length, real=True)
    noise_F = rfft(noise_L, size)
    exact_KL = [irfft(rfft(phi_L, size) * noise_F, size)[:length] for phi_L in phi_LK.T]
    return _Trial(phi_LK, noise_L, np.stack(exact_KL, axis=1))


def _is_faithful(step: Step, trial: _Trial, tolerance: float) -> bool:
    with np.errstate(over="ignore", invalid="ignore"):  # a bad candidate may overflow: its error is then not a number
        return all(_float32_error(step, trial, chunk, one_by_one=False) < tolerance for chunk in TRIAL_CHUNKS) and (
            _float32_error(step, trial, STEP_TRIAL_CHUNK, one_by_one=True) < tolerance
        )


def _float32_error(step: Step, trial: _Trial, chunk: int, one_by_one: bool) -> float:
    """Largest relative error of a channel on the trial's noise: chunk form in float32 against float64 FFT."""
    model = _in_chunks(step, trial.phi_LK, chunk)
    length = len(trial.noise_L)
    chunks_NC = np.zeros((-(-length // chunk), chunk), np.float32)
    chunks_NC.reshape(-1)[:length] = trial.noise_L
    inputs, toeplitz, outputs = (np.asarray(matrix, np.float32) for matrix in model[1:4])
    states = _states_one_by_one if one_by_one else _states_by_doubling
    features = chunks_NC @ toeplitz.reshape(-1, chunk).T
    features += states(model.transition_SS, chunks_NC @ inputs.T) @ outputs.reshape(-1, len(inputs)).T
    features_LK = features.reshape(-1, trial.phi_LK.shape[1])[:length]
    error_K = np.linalg.norm(features_LK - trial.exact_LK, axis=0) / np.linalg.norm(trial.exact_LK, axis=0)
    return float(np.nan_to_num(error_K, nan=np.inf).max())


def _states_by_doubling(transition_SS: Array, added_NS: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """As `megassm.ops.filterbank.chunk_states`, float32."""
    state_NS = np.zeros_like(added_NS)
    state_NS[1:] = added_NS[:-1]
    power_SS, distance = transition_SS, 1
    while distance < len(state_NS):
        state_NS[distance:] += state_NS[:-distance] @ power_SS.T.astype(np.float32)
        power_SS, distance = power_SS @ power_SS, 2 * distance
    return state_NS


def _states_one_by_one(transition_SS: Array, added_NS: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """As `FilterBank.step`, float32."""
    state_NS = np.zeros_like(added_NS)
    change_SS = (transition_SS - np.eye(len(transition_SS))).astype(np.float32)
    for n in range(1, len(state_NS)):
        state_NS[n] = state_NS[n - 1] + (change_SS @ state_NS[n - 1] + added_NS[n - 1])
    return state_NS
