"""The order of samples in plain Python integers, one position at a time."""

MASK = 0xFFFFFFFF


def philox(counter: list[int], seed: int) -> list[int]:
    key = [seed & MASK, (seed >> 32) & MASK]
    x = list(counter)
    for _ in range(10):
        p0, p1 = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
        x = [(p1 >> 32) ^ x[1] ^ key[0], p1 & MASK, (p0 >> 32) ^ x[3] ^ key[1], p0 & MASK]
        key = [(key[0] + 0x9E3779B9) & MASK, (key[1] + 0xBB67AE85) & MASK]
    return x


def sample_index(seed: int, position: int, n: int) -> int:
    epoch, cell = divmod(position, n)
    columns = next(c for c in range(1, n + 1) if c * c >= n)
    rows = -(-n // columns)
    while True:
        left, right = divmod(cell, columns)
        for turn in range(8):
            half, size = (right, rows) if turn % 2 == 0 else (left, columns)
            word = philox([half, epoch & MASK, ((epoch >> 32) << 8) | turn, 1], seed)[0]
            shift = (word * size) >> 32
            if turn % 2 == 0:
                left = (left + shift) % rows
            else:
                right = (right + shift) % columns
        cell = left * columns + right
        if cell < n:
            return cell
