"""The noise streams of noise.py inside a Triton kernel: drawn where they are used, never written down.

Philox4x32-10 for the words, Box-Muller for the normals: the integers are noise.py's bit for bit, the
normals to 1e-6. The library's log, sin and cos take any number and would cost half the kernel's time. The
ones here take what Box-Muller feeds them; their polynomials were fitted to the least largest error on the
ranges they name.
"""

import triton
import triton.language as tl


@triton.jit
def _minus_two_log(u):
    """-2 log u for u in [1e-7, 1): log of 2^e m is e log 2 + log m, here with m in [2/3, 4/3)."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) & -0x800000
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    q = tl.fma(f, -0.2805272766725686, 0.30777089906257465)
    q = tl.fma(f, q, -0.2799161217376167)
    q = tl.fma(f, q, 0.32831919849216107)
    q = tl.fma(f, q, -0.4002233742405471)
    q = tl.fma(f, q, 0.5001563786307424)
    q = tl.fma(f, q, -0.6666639627356555)
    q = tl.fma(f, q, 0.9999987215677503)
    # 2^23 log 4 divides, as exponent still sits 23 bits up.
    return tl.fma(f, tl.fma(f, q, -2.0), exponent.to(tl.float32) * -1.6525918e-07)


@triton.jit
def _sine_and_cosine(angle):
    """Both for angles of [0, 2 pi], from the rest to the nearest multiple of pi, and the sign they lack."""
    # Adding 1.5 * 2^23 rounds to a whole number, which is left in the low bits.
    rounded = tl.fma(angle, 0.3183098861837907, 12582912.0)
    turns = rounded - 12582912.0
    # pi in two parts, the first so short that its product with 0, 1 or 2 is exact.
    rest = tl.fma(turns, -3.140625, angle)
    rest = tl.fma(turns, -0.0009676535897932385, rest)
    z = rest * rest
    sine = tl.fma(z, 2.6057802664470817e-06, -0.00019809602742382323)
    sine = tl.fma(z, sine, 0.008333066244031288)
    sine = tl.fma(z, sine, -0.1666665955035335)
    sine = tl.fma(rest * z, sine, rest)
    cosine = tl.fma(z, -2.607710206728453e-07, 2.4761886070021055e-05)
    cosine = tl.fma(z, cosine, -0.001388840350491847)
    cosine = tl.fma(z, cosine, 0.04166664072782245)
    cosine = tl.fma(z, cosine, -0.49999999549552093)
    cosine = tl.fma(z, cosine, 1.0)
    # At odd multiples both change their sign.
    sign = rounded.to(tl.int32, bitcast=True) << 31
    return sine, cosine, sign


@triton.jit
def _normal_pair(bits1, bits2):
    """Box-Muller: two words to two normals."""
    u1 = tl.maximum(tl.uint_to_uniform_float(bits1), 1.0e-7)
    sine, cosine, sign = _sine_and_cosine(6.283185307179586 * tl.uint_to_uniform_float(bits2))
    radius = tl.sqrt(_minus_two_log(u1))
    radius = (radius.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    return radius * cosine, radius * sine


@triton.jit
def philox_words(seed_low, seed_high, step, item, branch, counter):
    """Philox4x32-10: four uint32 words of every counter of a branch.

    seed_low, seed_high, step: int32; the rest: uint32. A product's two words come from one multiplication.
    """
    k0, k1 = seed_low.to(tl.uint32, bitcast=True), seed_high.to(tl.uint32, bitcast=True)
    zero = counter * 0
    c0, c1, c2, c3 = counter, zero + step.to(tl.uint32, bitcast=True), zero + item, zero + branch
    for _ in tl.static_range(10):
        a, b = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (b >> 32).to(tl.uint32) ^ c1 ^ k0,
            b.to(tl.uint32),
            (a >> 32).to(tl.uint32) ^ c3 ^ k1,
            a.to(tl.uint32),
        )
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def noise_of(seed_low, seed_high, step, item, branch, counter):
    """Normals (COUNTERS, 4) of one branch of one item."""
    i0, i1, i2, i3 = philox_words(seed_low, seed_high, step, item, branch, counter)
    n0, n1 = _normal_pair(i0, i1)
    n2, n3 = _normal_pair(i2, i3)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (counter.shape[0], 4))
