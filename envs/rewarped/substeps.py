"""Runs a few kernels substep by substep on arrays that torch and Warp share, forwards and, by adjoints, backwards.

For simulations without a grid, whose arrays are small: fem.py and rigid.py. (mpm.py does the same for its grids.) Only
the state at the start of a step is kept; the backward pass runs the step again, which keeps the state of each substep,
and then launches the adjoint of each kernel by hand, last substep first.
"""

import functools

import torch
import warp as wp


class Substeps:
    """S substeps of N worlds.

    states, inputs, scratch   lists of (shape, Warp type); every shape begins with N. States have a value before and
                              after each substep, inputs hold for a whole step, scratch is zero before each substep
    launches(state, inputs, scratch, following)   -> [(kernel, dim, inputs, outputs)] of a substep, all lists of arrays
                              and numbers; the last of them alone writes the following state. Arrays that are none of
                              those given are constants
    """

    def __init__(self, states, inputs, scratch, launches, *, substeps: int, device, dtype, graph: bool):
        self.substeps, self.device, self.graph, self.graphs = substeps, torch.device(device), graph, {}
        self.bad_gradients = torch.zeros((), dtype=torch.int64, device=self.device)
        adjoints = {}

        def new(shape, kind, *lead):
            """A tensor of zeros and one of adjoints, with the Warp arrays of both for each index of `lead`."""
            tail = () if kind in (wp.float32, wp.float64) else tuple(kind._shape_)
            pair = [torch.zeros((*lead, *shape, *tail), dtype=dtype, device=self.device) for _ in range(2)]
            arrays = []
            for k in range(lead[0] if lead else 1):
                value, adjoint = (wp.from_torch(t[k] if lead else t, dtype=kind, requires_grad=False) for t in pair)
                adjoints[id(value)] = adjoint
                arrays.append(value)
            return (*pair, arrays)

        made = [new(*spec, substeps + 1) for spec in states]
        self.states, self.adj_states = [m[0] for m in made], [m[1] for m in made]
        given = [new(*spec) for spec in inputs]
        self.inputs, self.adj_inputs = [m[0] for m in given], [m[1] for m in given]
        between = [new(*spec)[2][0] for spec in scratch]
        self.zeroed, self.adj_zeroed = between, [adjoints[id(array)] for array in between]
        self.launches = []
        for s in range(substeps):
            now, following = [m[2][s] for m in made], [m[2][s + 1] for m in made]
            found = launches(now, [m[2][0] for m in given], between, following)
            self.launches.append([(*launch, *([adjoints.get(id(a)) if isinstance(a, wp.array) else a for a in part]
                                              for part in launch[2:])) for launch in found])  # fmt: skip
        self.keep = (made, given, adjoints)  # arrays live as long as the launches that name them

    def _launch(self, launch, **options) -> None:
        wp.launch(*launch, device=str(self.device), record_tape=False, **options)

    def _forward_all(self) -> None:
        for launches in self.launches:
            for array in self.zeroed:
                array.zero_()
            for launch in launches:
                self._launch(launch[:4])

    def _backward_all(self) -> None:
        for launches in reversed(self.launches):
            for array in (*self.zeroed, *self.adj_zeroed):
                array.zero_()
            for launch in launches[:-1]:  # the scratch of this substep again
                self._launch(launch[:4])
            for launch in reversed(launches):
                self._launch(launch, adjoint=True)

    def _run(self, name: str) -> None:
        """Runs a method, as a captured graph where that is wanted."""
        if self.graph and name not in self.graphs:  # on Warp's own stream: CUDA refuses to capture torch's default one
            with wp.ScopedCapture(device=str(self.device), force_module_load=False) as capture:
                getattr(self, name)()
            self.graphs[name] = capture.graph
        stream = wp.stream_from_torch(torch.cuda.current_stream(self.device)) if self.device.type == "cuda" else None
        with wp.ScopedStream(stream):
            if self.graph:
                wp.capture_launch(self.graphs[name], stream=stream)
            else:
                getattr(self, name)()

    def forward(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """States after a step, from states and inputs before it; views that the next step overwrites."""
        for own, value in zip([t[0] for t in self.states] + self.inputs, tensors, strict=True):
            own.copy_(value)
        self._run("_forward_all")
        return [t[-1] for t in self.states]

    def backward(self, *adj: torch.Tensor) -> list[torch.Tensor]:
        """Adjoints of states and inputs before the step that was run last, from those of the states after it."""
        for tensor in (*self.adj_states, *self.adj_inputs):
            tensor.zero_()
        for own, value in zip(self.adj_states, adj, strict=True):
            own[-1].copy_(value)
        self._run("_backward_all")
        return [t[0] for t in self.adj_states] + self.adj_inputs

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
        # A world that has blown up has no gradient: zero, so that it does not reach the weights that all worlds share.
        finite = functools.reduce(torch.logical_and, (t.isfinite().reshape(len(t), -1).all(1) for t in found))
        sub.bad_gradients += (~finite).sum()
        return None, *(torch.where(finite.view(-1, *[1] * (t.dim() - 1)), t, 0.0) for t in found)
