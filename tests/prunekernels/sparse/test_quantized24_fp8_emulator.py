"""An emulated mma.sp of e4m3 values proves the order of operands made from the packed words.

The instruction is written from the PTX ISA (`ptx.tensor_cores.mma_sp_m16n8k64_e4m3`), not from the
kernel: its operands are the 32-bit registers of 32 lanes.
"""

from __future__ import annotations

import numpy as np
import ptx
import pytest
import torch
from packed_formats import two_of_four
from prunekernels import quantized24_pack
from torch import Tensor

LANE = np.arange(32)


def operands(weight: Tensor, x: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A, B and metadata of one instruction for e4m3 weights (16, 64), 2:4, and x (8, 64)."""
    kept = weight.float() != 0
    a, e = np.zeros((1, 32, 4), np.uint32), np.zeros((1, 32), np.uint32)
    bits = weight.view(torch.uint8).numpy()
    for row in range(16):
        for group in range(16):
            at = kept[row, 4 * group : 4 * group + 4].nonzero().flatten().tolist()
            # what fills a group stands at the lowest free places
            at = sorted([*at, *(i for i in range(4) if i not in at)][:2])
            # a register has two neighbours, eight groups apart from the next
            lane = row % 8 * 4 + group % 8 // 2
            register = row // 8 + 2 * (group // 8)
            for i, column in enumerate(at):
                code = int(bits[row, 4 * group + column])
                a[0, lane, register] |= np.uint32(code << 8 * (2 * (group % 2) + i))
            nibble = at[0] | at[1] << 2
            e[0, row % 8 * 4 + group // 4] |= np.uint32(nibble << 16 * (row // 8) + 4 * (group % 4))
    b = np.zeros((1, 32, 4), np.uint32)
    codes = x.view(torch.uint8).numpy().astype(np.uint32)
    for register in range(4):
        for byte in range(4):
            row = 16 * register + 4 * (LANE % 4) + byte
            b[0, :, register] |= codes[LANE // 4, row] << np.uint32(8 * byte)
    return a, b, e


def of_lanes(registers: np.ndarray) -> Tensor:
    """(8 tokens, 16 rows) of the accumulators of one warp."""
    out = torch.zeros(8, 16, dtype=torch.float64)
    for i in range(4):
        token, row = 2 * (LANE % 4) + i % 2, LANE // 4 + 8 * (i // 2)
        out[token, row] = torch.from_numpy(registers[0, :, i]).double()
    return out


def e4m3(*shape: int) -> Tensor:
    """Random codes of every size, NaN left out."""
    codes = torch.randint(0, 256, shape).to(torch.uint8)
    codes[codes & 0x7F == 0x7F] = 1
    return codes.view(torch.float8_e4m3fn)


def test_the_instruction_multiplies_what_its_operands_say():
    weight = (e4m3(16, 64).float() * two_of_four(16, 64)).to(torch.float8_e4m3fn)
    x = e4m3(8, 64)
    c = torch.randn(1, 32, 4).numpy()
    got = ptx.tensor_cores.mma_sp_m16n8k64_e4m3(
        *operands(weight, x)[:2], c, operands(weight, x)[2], 0
    )
    want = x.double() @ weight.double().T + of_lanes(c)
    assert torch.equal(of_lanes(got).float(), want.float())


def test_an_adder_of_few_bits_cuts_what_lies_below_the_largest():
    weight, x = torch.zeros(16, 64), torch.zeros(8, 64)
    weight[3, [0, 5]] = torch.tensor([256.0, 1.0])
    x[2, [0, 5]] = torch.tensor([2.0, 0.75])
    a, b, e = operands(weight.to(torch.float8_e4m3fn), x.to(torch.float8_e4m3fn))
    c = np.zeros((1, 32, 4), np.float32)
    for mantissa, want in ((None, 512.75), (11, 512.75), (10, 512.5), (9, 512.0)):
        found = ptx.tensor_cores.mma_sp_m16n8k64_e4m3(a, b, c, e, 0, mantissa)
        assert of_lanes(found)[2, 3] == want
    # the former sum is an addend as well, and negative ones are cut towards zero
    c[:] = -4096.5
    found = ptx.tensor_cores.mma_sp_m16n8k64_e4m3(a, b, c, e, 0, 12)
    assert of_lanes(found)[2, 3] == 512 - 4096 and of_lanes(found)[0, 0] == -4096


def test_what_the_instruction_does_not_take():
    zero = np.zeros((1, 32, 4), np.uint32)
    e = np.full((1, 32), 0x44444444, np.uint32)
    with pytest.raises(ValueError, match="selector 1, not 0"):
        ptx.tensor_cores.mma_sp_m16n8k64_e4m3(zero, zero, zero.view(np.float32), e, 1)
    with pytest.raises(ValueError, match="do not increase"):
        ptx.tensor_cores.mma_sp_m16n8k64_e4m3(zero, zero, zero.view(np.float32), e & 0, 0)


def halves(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bytes 1 and 3 of a packed word, and bytes 0 and 2: rows g and g + 8 of one group."""
    return words >> 8 & 0xFF | words >> 16 & 0xFF00, words & 0xFF | words >> 8 & 0xFF00


def of_128_columns(unit: np.ndarray, block: int) -> list[tuple[np.ndarray, np.ndarray, list[int]]]:
    """A, metadata and the groups in their order, of two instructions, from 640 packed words."""
    words = unit[:512].reshape(4, 32, 2, 2)[2 * block : 2 * block + 2]
    metadata = unit[512:].reshape(32, 4)[:, 2 * block : 2 * block + 2]
    found = []
    for i in range(2):
        a, e = np.zeros((1, 32, 4), np.uint32), np.zeros((1, 32), np.uint32)
        for step in range(4):
            # two steps that are 64 columns apart share registers
            for row, half in enumerate(halves(words[step // 2, :, step % 2, i])):
                a[0, :, row + 2 * (step % 2)] |= half << np.uint32(16 * (step // 2))
        order = []
        for position in range(16):
            # thread of the quad that multiplies it, its step, and the group in that step
            thread = position % 8 // 2
            step = position // 8 + 2 * (position % 2)
            group = thread + 4 * i
            order.append(8 * step + group)
            source = LANE // 4 * 4 + 2 * (step % 2) + group // 4
            pair = metadata[source, step // 2] >> np.uint32(4 * (group % 4)) & 0x000F000F
            own = position // 4 == LANE % 4
            e[0] |= np.where(own, pair << np.uint32(4 * (position % 4)), 0).astype(np.uint32)
        found.append((a, e, order))
    return found


def test_packed_words_are_operands_of_two_instructions_in_another_order_of_columns():
    mask = two_of_four(16, 256)
    packed = quantized24_pack(e4m3(16, 256), mask, torch.ones(16, 1), kind="2:4-fp8")
    x = e4m3(8, 256)
    unit = packed.packed[0].numpy().view(np.uint32)
    acc = np.zeros((1, 32, 4), np.float32)
    for block in range(2):
        columns = x[:, 128 * block : 128 * (block + 1)].view(8, 32, 4)
        for a, e, order in of_128_columns(unit, block):
            _, b, _ = operands(
                torch.zeros(16, 64).to(torch.float8_e4m3fn), columns[:, order].view(8, 64)
            )
            acc = ptx.tensor_cores.mma_sp_m16n8k64_e4m3(a, b, acc, e, 0)
    exact = x.double() @ packed.to(dtype=torch.float32).to_dense().double().T
    torch.testing.assert_close(of_lanes(acc), exact, rtol=1e-6, atol=1e-2)
