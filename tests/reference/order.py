"""The order of samples in Python integers, one position at a time."""

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
    epoch, place = divmod(position, n)
    return shuffled(seed, epoch, n)[place] if n <= 9 else permuted(seed, epoch, place, n, 1)


def shuffled(seed: int, epoch: int, n: int) -> list[int]:
    order = list(range(n))
    for last in range(n - 1, 0, -1):
        word = philox([last, epoch & MASK, ((epoch >> 32) << 8) & MASK | 255, 1], seed)[0]
        other = (word * (last + 1)) >> 32
        order[last], order[other] = order[other], order[last]
    return order


def blocks_index(seed: int, position: int, n: int, block: int, window: int) -> int:
    if n <= 9:
        return sample_index(seed, position, n)
    epoch, place = divmod(position, n)
    blocks, size = n // block, block * window
    windows = max(blocks // window, 1)
    number = min(place // size, windows - 1)
    count = size if number < windows - 1 else n - number * size
    slot = number * size + permuted(seed, epoch * windows + number, place - number * size, count, 11)
    number_of_block, within = divmod(slot, block)
    if number_of_block < blocks:
        slot = permuted(seed, epoch, number_of_block, blocks, 10) * block + within
    word = philox([epoch & MASK, epoch >> 32, 0, 12], seed)[0]
    return (slot + ((word * n) >> 32)) % n


def permuted(seed: int, epoch: int, cell: int, n: int, stream: int) -> int:
    columns = next(c for c in range(1, n + 1) if c * c >= n)
    rows = -(-n // columns)
    while True:
        left, right = divmod(cell, columns)
        for turn in range(8):
            half, size = (right, rows) if turn % 2 == 0 else (left, columns)
            word = philox([half, epoch & MASK, ((epoch >> 32) << 8) | turn, stream], seed)[0]
            shift = (word * size) >> 32
            if turn % 2 == 0:
                left = (left + shift) % rows
            else:
                right = (right + shift) % columns
        cell = left * columns + right
        if cell < n:
            return cell
