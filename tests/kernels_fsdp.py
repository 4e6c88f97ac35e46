"""Two FSDP2 ranks with half the batch each equal one process with all of it: loss, gradients, a gathered head, refusals.
Starts both ranks itself (gloo, CPU).
"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial

from kernels import TeacherHead, TeacherLogits, fused_linear_divergence, fused_linear_logprob

B, HIDDEN, VOCAB = 12, 8, 37


class Student(nn.Module):
    """The loss is part of forward: there FSDP2 has unsharded the head, and its hooks see the head's gradient."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, inputs, teacher, weight):
        return fused_linear_divergence(self.body(inputs), self.head.weight, teacher, weight=weight)[0]


def batch():
    generator = torch.Generator().manual_seed(1)
    weight = (torch.rand(B, generator=generator) < 0.7).float()
    weight[: B // 2] = 0  # all of rank 0's tokens are masked: it must still take part, with zero gradients
    weight = weight / weight.sum()  # one global token count
    return torch.randn(B, HIDDEN, generator=generator), torch.randn(B, VOCAB, generator=generator), weight


def run(rank, rendezvous):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    torch.manual_seed(0)
    whole, sharded = Student(), Student()
    sharded.load_state_dict(whole.state_dict())
    inputs, teacher_logits, mask = batch()
    for weight in (mask, mask.flip(0), mask + 0.1):
        whole.zero_grad()
        expected = whole(inputs, TeacherLogits(teacher_logits), weight)
        expected.backward()

        model = Student()
        model.load_state_dict(whole.state_dict())
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (2,)))
        half = slice(rank * B // 2, (rank + 1) * B // 2)
        loss = model(inputs[half], TeacherLogits(teacher_logits[half]), weight[half])
        (2 * loss).backward()  # FSDP2 averages over the ranks; the weights hold the global count already
        total = loss.detach().clone()
        dist.all_reduce(total)
        torch.testing.assert_close(total, expected.detach())
        for parameter, reference in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad.full_tensor(), reference.grad)

    # the head gathered by hand: its gradient goes back through autograd, summed over the ranks, to the shards
    model.reshard()
    shards = model.head.weight
    assert isinstance(shards, DTensor)
    hidden, teacher_logits, weight = inputs[half], teacher_logits[half], weight[half]
    for kind in ("reverse_kl", "logprob"):

        def loss_of(hidden, head, teacher_logits, weight, kind=kind):
            if kind == "logprob":
                return (weight * fused_linear_logprob(hidden, head, torch.zeros(len(hidden)).long())[0]).sum()
            return fused_linear_divergence(hidden, head, TeacherLogits(teacher_logits), weight=weight)[0]

        reference = whole.head.weight.detach().clone().requires_grad_()
        loss_of(batch()[0], reference, batch()[1], mask + 0.1).backward()
        shards.grad = None
        for times in (1, 2):  # two micro-batches into one .grad
            loss_of(hidden, shards.full_tensor(grad_placements=[Partial()]), teacher_logits, weight).backward()
            torch.testing.assert_close(shards.grad.full_tensor(), times * reference.grad)

    whole_head, ids = torch.randn(VOCAB, HIDDEN), torch.zeros(len(hidden)).long()
    for name, refused in (
        ("student_weight", lambda: fused_linear_divergence(hidden, shards, TeacherLogits(teacher_logits))),
        ("teacher.weight", lambda: fused_linear_divergence(hidden, whole_head, TeacherHead(hidden, shards))),
        ("weight", lambda: fused_linear_logprob(hidden, shards, ids)),
    ):
        try:
            refused()
        except ValueError as error:
            assert str(error).startswith(f"{name} is a DTensor") and "full_tensor" in str(error), error
        else:
            raise AssertionError("a DTensor head was accepted")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, args=(os.path.join(folder, "rendezvous"),), nprocs=2)
    print("ok")
