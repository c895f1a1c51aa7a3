"""Runs a few kernels substep by substep on arrays that torch and Warp share, forwards and, by adjoints, backwards.

`Launcher` is the path that all simulations share: a step is S substeps of a few launches, run one by one or replayed
as a captured graph, and its adjoint the same, last substep first. `Substeps` is the rest for simulations without a
grid, whose arrays are small (fem.py and rigid.py): only the state at the start of a step is kept; the backward pass
runs the step again, which keeps the state of each substep. mpm.py has a workspace of its own, with grids.
"""

import functools

import torch
import warp as wp

wp.config.log_level = wp.LOG_WARNING  # no line for every kernel that is loaded


def own_gradient(finite: torch.Tensor, adjoint: torch.Tensor) -> torch.Tensor:
    """Adjoint (N, ...) with zeros in environments that are not finite (N,).

    One that has blown up has no gradient, so that it does not reach the weights that all of them share.
    """
    return torch.where(finite.view(-1, *[1] * (adjoint.dim() - 1)), adjoint, 0.0)


def all_finite(tensors) -> torch.Tensor:
    """Environments (N,) whose entries are finite in every tensor (N, ...)."""
    each = [tensor.isfinite().reshape(len(tensor), -1).all(1) for tensor in tensors]
    return functools.reduce(torch.logical_and, each)


class Launcher:
    """A step of S substeps and its adjoint. A subclass has `forward_substep(s)` and `backward_substep(s)`.

    A launch is (kernel, dim, inputs, outputs, adjoints of inputs, adjoints of outputs); numbers are their own adjoint.
    """

    def __init__(self, substeps: int, device, graph: bool):
        self.substeps, self.device, self.graph = substeps, torch.device(device), graph
        self.graphs = {}

    def forward_substep(self, s: int) -> None:
        raise NotImplementedError

    def backward_substep(self, s: int) -> None:
        raise NotImplementedError

    def launch(self, launch: tuple, adjoint: bool = False) -> None:
        """Launch a kernel, or its adjoint."""
        arguments = launch if adjoint else launch[:4]
        wp.launch(*arguments, adjoint=adjoint, device=str(self.device), record_tape=False)

    def forward_all(self) -> None:
        for s in range(self.substeps):
            self.forward_substep(s)

    def backward_all(self) -> None:
        for s in reversed(range(self.substeps)):
            self.backward_substep(s)

    def run(self, name: str) -> None:
        """Run `forward_all` or `backward_all`, as a captured graph where that is wanted.

        Captured once, since the arrays stay where they are, and on Warp's own stream, since CUDA refuses to capture
        torch's default one.
        """
        work = getattr(self, name)
        if self.graph and name not in self.graphs:
            with wp.ScopedCapture(device=str(self.device), force_module_load=False) as capture:
                work()
            self.graphs[name] = capture.graph
        stream = None
        if self.device.type == "cuda":
            stream = wp.stream_from_torch(torch.cuda.current_stream(self.device))
        with wp.ScopedStream(stream):
            if self.graph:
                wp.capture_launch(self.graphs[name], stream=stream)
            else:
                work()


class Substeps(Launcher):
    """S substeps of N environments.

    states, inputs, scratch   lists of (shape, Warp type); every shape begins with N. States have a value before and
                              after each substep, inputs hold for a whole step, scratch is zero before each substep
    launches(state, inputs, scratch, following)   -> [(kernel, dim, inputs, outputs)] of a substep, all lists of arrays
                              and numbers; the last of them alone writes the following state. Arrays that are none of
                              those given are constants
    """

    def __init__(
        self, states, inputs, scratch, launches, *, substeps: int, device, dtype, graph: bool
    ):
        super().__init__(substeps, device, graph)
        self.bad_gradients = torch.zeros((), dtype=torch.int64, device=self.device)
        adjoints = {}

        def new(shape, kind, *lead):
            """A tensor of zeros and one of adjoints, with the Warp arrays of both for each index of `lead`."""
            tail = () if kind in (wp.float32, wp.float64) else tuple(kind._shape_)
            pair = [
                torch.zeros((*lead, *shape, *tail), dtype=dtype, device=self.device)
                for _ in range(2)
            ]
            arrays = []
            for k in range(lead[0] if lead else 1):
                parts = [tensor[k] if lead else tensor for tensor in pair]
                value, adjoint = (
                    wp.from_torch(part, dtype=kind, requires_grad=False) for part in parts
                )
                adjoints[id(value)] = adjoint
                arrays.append(value)
            return (*pair, arrays)

        def with_adjoints(launch: tuple) -> tuple:
            parts = []
            for part in launch[2:]:
                parts.append([adjoints.get(id(a)) if isinstance(a, wp.array) else a for a in part])
            return (*launch, *parts)

        made = [new(*spec, substeps + 1) for spec in states]
        given = [new(*spec) for spec in inputs]
        self.states, self.adj_states = [m[0] for m in made], [m[1] for m in made]
        self.inputs, self.adj_inputs = [g[0] for g in given], [g[1] for g in given]
        between = [new(*spec)[2][0] for spec in scratch]
        self.zeroed, self.adj_zeroed = between, [adjoints[id(array)] for array in between]
        held = [g[2][0] for g in given]
        self.launches = []
        for s in range(substeps):
            now, following = [m[2][s] for m in made], [m[2][s + 1] for m in made]
            self.launches.append(
                [with_adjoints(launch) for launch in launches(now, held, between, following)]
            )
        self.keep = (made, given, adjoints)  # arrays live as long as the launches that name them

    def forward_substep(self, s: int) -> None:
        for array in self.zeroed:
            array.zero_()
        for launch in self.launches[s]:
            self.launch(launch)

    def backward_substep(self, s: int) -> None:
        for array in (*self.zeroed, *self.adj_zeroed):
            array.zero_()
        for launch in self.launches[s][:-1]:  # the scratch of this substep again
            self.launch(launch)
        for launch in reversed(self.launches[s]):
            self.launch(launch, adjoint=True)

    def forward(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """States after a step, from states and inputs before it; views that the next step overwrites."""
        own = [tensor[0] for tensor in self.states] + self.inputs
        for mine, value in zip(own, tensors, strict=True):
            mine.copy_(value)
        self.run("forward_all")
        return [tensor[-1] for tensor in self.states]

    def backward(self, *adj: torch.Tensor) -> list[torch.Tensor]:
        """Adjoints of states and inputs before the step that was run last, from those of the states after it."""
        for tensor in (*self.adj_states, *self.adj_inputs):
            tensor.zero_()
        for own, value in zip(self.adj_states, adj, strict=True):
            own[-1].copy_(value)
        self.run("backward_all")
        return [tensor[0] for tensor in self.adj_states] + self.adj_inputs

    def step(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The states after a step, differentiable with respect to states and inputs."""
        return _Step.apply(self, *tensors)


class _Step(torch.autograd.Function):
    """A step, as torch sees it."""

    @staticmethod
    def forward(ctx, sub, *tensors):
        ctx.sub = sub
        ctx.save_for_backward(*tensors)
        return tuple(tensor.clone() for tensor in sub.forward(*tensors))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *adj):
        sub = ctx.sub
        sub.forward(*ctx.saved_tensors)
        found = sub.backward(*adj)
        finite = all_finite(found)
        sub.bad_gradients += (~finite).sum()
        return None, *(own_gradient(finite, tensor) for tensor in found)
