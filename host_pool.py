"""Host blocks for swapped sequences, and the transfers between them and the device's pool.

What it is: the tensors of section 4.5 of the paper. The paper swaps block by block and layer by
layer, so that small blocks are many small transfers (section 7.3, Fig. 19a). Here a host block
holds all layers of its tokens side by side and is one transfer, as is a run of them; the device
gathers what it sends and scatters what it gets, in one launch each. No copy is made on the host.

How to use it: `PagedKVCache` of paged_attention.py does.

Shapes: L layers, N device blocks, S slots per block, H_kv K/V heads, D head size.
"""

import torch

STAGING_BYTES = 256 << 20  # of device memory that a swap takes at a time, or one block if larger


class HostPool:
    """num_blocks host blocks for a device pool (L, 2, N, S, H_kv, D); pinned if that is on CUDA."""

    def __init__(self, num_blocks, pool, kernels=None):
        """Allocate it, uninitialised. kernels: the module block_kernels, None for plain torch."""
        shape = (num_blocks, *pool.shape[:2], *pool.shape[3:])
        pinned = pool.device.type == "cuda" and num_blocks > 0
        self._pool = torch.empty(shape, dtype=pool.dtype, pin_memory=pinned)
        self._rows = self._pool.flatten(3).flatten(1, 2)  # (num_blocks, L * 2, S * H_kv * D)
        self._device_rows = pool.flatten(3).flatten(0, 1)  # (L * 2, N, S * H_kv * D)
        self._kernels = kernels
        self._moved = None  # a CUDA event: the last swap is done

    @property
    def tensor(self):
        """The host blocks (num_blocks, L, 2, S, H_kv, D), after waiting for all swaps so far.

        Swaps do not wait for their transfers, and the host waits for no stream by itself.
        """
        if self._moved is not None:
            self._moved.synchronize()
        return self._pool

    @torch.no_grad()
    def swap(self, pairs, out):
        """Copy blocks to the host (out) or to the device. pairs: (device, host) block numbers.

        On CUDA it waits for nothing: the stream orders it before what comes next. The caller has
        checked the pairs.
        """
        device = self._device_rows.device
        if device.type == "cpu" and self._kernels is None:  # both are here: nothing to stage
            for block, host in pairs:
                if out:
                    self._rows[host].copy_(self._device_rows[:, block])
                else:
                    self._device_rows[:, block].copy_(self._rows[host])
            return
        pairs = sorted(pairs, key=lambda pair: pair[1])  # for long runs of host blocks
        step = max(1, STAGING_BYTES // max(1, self._rows[:1].nbytes))
        for first in range(0, len(pairs), step):
            self._swap_staged(pairs[first : first + step], out)
        if pairs and device.type == "cuda":
            self._moved = torch.cuda.current_stream(device).record_event()

    def _swap_staged(self, pairs, out):
        """The same for pairs in the order of their host blocks, by way of device memory."""
        blocks, hosts = zip(*pairs)
        shape = (len(pairs), *self._rows.shape[1:])
        staged = self._rows.new_empty(shape, device=self._device_rows.device)
        if out:
            self._gather(blocks, staged)
        for at, host, length in runs(hosts):
            here, there = staged[at : at + length], self._rows[host : host + length]
            if out:
                there.copy_(here, non_blocking=True)
            else:
                here.copy_(there, non_blocking=True)
        if not out:
            self._scatter(staged, blocks)

    def _gather(self, blocks, staged):
        """Device blocks into staged (len(blocks), L * 2, S * H_kv * D)."""
        staged = staged.transpose(0, 1)
        if self._kernels is None:
            index = upload(blocks, staged.device)
            staged.copy_(self._device_rows.index_select(1, index))
        else:
            pairs = [(block, at) for at, block in enumerate(blocks)]
            self._kernels.move_blocks(self._device_rows, staged, upload(pairs, staged.device))

    def _scatter(self, staged, blocks):
        """staged (len(blocks), L * 2, S * H_kv * D) into device blocks."""
        staged = staged.transpose(0, 1)
        if self._kernels is None:
            self._device_rows.index_copy_(1, upload(blocks, staged.device), staged)
        else:
            pairs = list(enumerate(blocks))
            self._kernels.move_blocks(staged, self._device_rows, upload(pairs, staged.device))


def runs(numbers):
    """The runs of consecutive numbers in a list: (index of the first, the first, how many)."""
    starts = [i for i, n in enumerate(numbers) if i == 0 or n != numbers[i - 1] + 1]
    ends = [*starts[1:], len(numbers)]
    return [(start, numbers[start], end - start) for start, end in zip(starts, ends)]


def upload(numbers, device):
    """Integers as an int64 tensor on the device, without waiting for the device."""
    tensor = torch.tensor(numbers, dtype=torch.int64)
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # from pageable memory the transfer would block
    return tensor.to(device, non_blocking=True)
