"""A Triton kernel that writes down the random words of `noise_triton`, which never leave it."""

import triton
import triton.language as tl

from drm.noise_triton import philox_words


# A 1 or -1 that is specialised has no type to convert.
@triton.jit(do_not_specialize=["seed_low", "seed_high", "step"])
def words_kernel(out, streams, seed_low, seed_high, step, COUNTERS: tl.constexpr):
    counter = tl.arange(0, COUNTERS)
    item, branch = tl.load(streams).to(tl.uint32), tl.load(streams + 1).to(tl.uint32)
    w0, w1, w2, w3 = philox_words(seed_low, seed_high, step, item, branch, counter.to(tl.uint32))
    tl.store(out + counter, w0.to(tl.int64))
    tl.store(out + COUNTERS + counter, w1.to(tl.int64))
    tl.store(out + 2 * COUNTERS + counter, w2.to(tl.int64))
    tl.store(out + 3 * COUNTERS + counter, w3.to(tl.int64))
