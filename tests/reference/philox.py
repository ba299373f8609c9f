"""Philox-4x32-10 in plain integers, as the paper writes it."""


def philox_slow(counter: list[int], seed: int) -> list[int]:
    x, key = list(counter), [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        high_0, low_0 = divmod(0xD2511F53 * x[0], 1 << 32)
        high_1, low_1 = divmod(0xCD9E8D57 * x[2], 1 << 32)
        x = [high_1 ^ x[1] ^ key[0], low_1, high_0 ^ x[3] ^ key[1], low_0]
        key = [(key[0] + 0x9E3779B9) % (1 << 32), (key[1] + 0xBB67AE85) % (1 << 32)]
    return x
