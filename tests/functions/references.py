"""What the example functions compute, once more in Python, and payloads for them."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Sequence
from typing import Any

Pixel = tuple[int, int, int, int]
Image = tuple[int, int, list[Pixel]]


def canonical(text: bytes) -> bytes:
    """The shortest form of a JSON text, with sorted keys."""
    return json.dumps(json.loads(text), ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def json_texts(seed: int, count: int) -> list[bytes]:
    """JSON texts whose numbers Python writes as they are."""
    chance = random.Random(seed)
    letters = ' "\\/\b\f\n\r\t\x00\x1f\x7fazé߿ࠀ￿\U00010000\U0010ffff😀'

    def text() -> str:
        return "".join(chance.choice(letters) for _ in range(chance.randrange(8)))

    def value(depth: int) -> Any:
        kind = chance.randrange(5 if depth == 0 else 8)
        if kind < 5:
            return (None, True, chance.randrange(-(10**20), 10**20), chance.uniform(-1e3, 1e3), text())[kind]
        if kind == 5:
            return [value(depth - 1) for _ in range(chance.randrange(5))]
        return {text(): value(depth - 1) for _ in range(chance.randrange(20))}

    return [
        json.dumps(value(5), ensure_ascii=bool(n % 2), indent=(None, 3)[n % 3 == 0]).encode()
        for n in range(count)
    ]


def matrix_payload(m: int, k: int, n: int, left: Sequence[float], right: Sequence[float]) -> bytes:
    return struct.pack(f"<3I{m * k + k * n}d", m, k, n, *left, *right)


def product(m: int, k: int, n: int, left: Sequence[float], right: Sequence[float]) -> list[float]:
    result = []
    for row in range(m):
        for column in range(n):
            total = 0.0
            for i in range(k):  # in this order, so that every bit is the same
                total += left[row * k + i] * right[i * n + column]
            result.append(total)
    return result


# ---- images ----------------------------------------------------------------------------------------


def qoi_slot(pixel: Pixel) -> int:
    r, g, b, a = pixel
    return (3 * r + 5 * g + 7 * b + 11 * a) % 64


def qoi_write(image: Image, chance: random.Random, channels: int = 4) -> bytes:
    """Encode with whichever of the fitting operations chance takes, so that a reader meets them all."""
    width, height, pixels = image
    out = bytearray(b"qoif" + struct.pack(">IIBB", width, height, channels, 0))
    seen: list[Pixel] = [(0, 0, 0, 0)] * 64
    last: Pixel = (0, 0, 0, 255)
    place = 0
    while place < len(pixels):
        pixel = pixels[place]
        r, g, b = ((new - old + 128) % 256 - 128 for new, old in zip(pixel[:3], last[:3], strict=True))
        ways = [b"\xff" + bytes(pixel)]
        if pixel[3] == last[3]:
            ways.append(b"\xfe" + bytes(pixel[:3]))
            if all(-2 <= d < 2 for d in (r, g, b)):
                ways.append(bytes([0x40 | (r + 2) << 4 | (g + 2) << 2 | (b + 2)]))
            if -32 <= g < 32 and -8 <= r - g < 8 and -8 <= b - g < 8:
                ways.append(bytes([0x80 | (g + 32), (r - g + 8) << 4 | (b - g + 8)]))
        if seen[qoi_slot(pixel)] == pixel:
            ways.append(bytes([qoi_slot(pixel)]))
        run = 0
        while pixel == last and run < 62 and place + run < len(pixels) and pixels[place + run] == pixel:
            run += 1
        if run:
            ways.append(bytes([0xC0 | (run - 1)]))
        way = chance.choice(ways)
        out += way
        place += run if run and way == ways[-1] else 1
        seen[qoi_slot(pixel)] = last = pixel
    return bytes(out + b"\0\0\0\0\0\0\0\1")


def qoi_read(data: bytes) -> Image:
    """Decode; ValueError when it is no image."""
    magic, width, height, channels, space = struct.unpack_from(">4sIIBB", data)
    if magic != b"qoif" or channels not in (3, 4) or space > 1:
        raise ValueError("no QOI image")
    body, end = data[14:-8], data[-8:]
    if end != b"\0\0\0\0\0\0\0\1":
        raise ValueError("no end")
    pixels: list[Pixel] = []
    seen: list[Pixel] = [(0, 0, 0, 0)] * 64
    r, g, b, a = 0, 0, 0, 255
    at = 0
    while at < len(body):
        tag = body[at]
        at += 1
        run = 1
        if tag == 0xFF:
            r, g, b, a = body[at : at + 4]
            at += 4
        elif tag == 0xFE:
            r, g, b = body[at : at + 3]
            at += 3
        elif tag < 0x40:
            r, g, b, a = seen[tag]
        elif tag < 0x80:
            r, g, b = ((old + (tag >> shift & 3) - 2) % 256 for old, shift in ((r, 4), (g, 2), (b, 0)))
        elif tag < 0xC0:
            green = tag - 0x80 - 32
            r, g, b = (
                (r + green + (body[at] >> 4) - 8) % 256,
                (g + green) % 256,
                (b + green + (body[at] & 15) - 8) % 256,
            )
            at += 1
        else:
            run = tag - 0xC0 + 1
        seen[qoi_slot((r, g, b, a))] = (r, g, b, a)
        pixels += [(r, g, b, a)] * run
    if len(pixels) != width * height:
        raise ValueError("pixels are missing")
    return width, height, pixels


def shrink(image: Image, side: int) -> Image:
    """Means of the pixels below each pixel of the thumbnail."""
    width, height, pixels = image
    longer = max(width, height)
    if longer <= side:
        return image
    small_width, small_height = max(1, width * side // longer), max(1, height * side // longer)
    small: list[Pixel] = []
    for y in range(small_height):
        for x in range(small_width):
            below = [
                pixels[j * width + i]
                for j in range(y * height // small_height, (y + 1) * height // small_height)
                for i in range(x * width // small_width, (x + 1) * width // small_width)
            ]
            opaque = sum(pixel[3] for pixel in below)
            if not opaque:
                small.append((0, 0, 0, 0))
                continue
            r, g, b = (
                (sum(pixel[c] * pixel[3] for pixel in below) + opaque // 2) // opaque for c in range(3)
            )
            small.append((r, g, b, (opaque + len(below) // 2) // len(below)))
    return small_width, small_height, small


def pictures(seed: int) -> list[Image]:
    """Smooth, flat, noisy and see-through images of several shapes."""
    chance = random.Random(seed)
    found: list[Image] = []
    for width, height in ((1, 1), (1, 200), (90, 70), (64, 64), (131, 40)):
        kind = len(found) % 3
        pixels: list[Pixel] = []
        for place in range(width * height):
            x, y = place % width, place // width
            if kind == 0:
                pixels.append((x * 3 % 256, y * 2 % 256, (x + y) % 256, 255))
            elif kind == 1:
                pixels.append((10, 200, 30, 255) if x // 8 % 2 else (0, 0, 0, 0))
            else:
                pixels.append((chance.randrange(256), chance.randrange(4), 7, chance.choice((0, 128, 255))))
        found.append((width, height, pixels))
    return found
