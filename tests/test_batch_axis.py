"""The driver of the batch-axis analysis, and properties that hold for all rules."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._inductor.inductor_prims  # registers Inductor's own prims
from perturbation import at, batched, check_op, ints, k, trace, x
from torch import fx

from flashnorm_compile.passes.batch_axis import Batched, Constant, Mixed, analyze, registry

aten = torch.ops.aten
K, B0 = Constant(), batched(0)


def placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def named(gm: fx.GraphModule, prefix: str) -> fx.Node:
    return next(node for node in gm.graph.nodes if node.name.startswith(prefix))


class TestSeeds:
    def test_every_placeholder_needs_one(self) -> None:
        gm = trace(lambda a, b: a + b, (k(3), k(3)))
        a, b = placeholders(gm)
        with pytest.raises(ValueError, match=f"no seed for placeholder {b.name}"):
            analyze(gm.graph, {a: B0}, 3)

    def test_constants_stay_constant_whatever_the_op(self) -> None:
        gm = trace(lambda a: torch.rand_like(a).cumsum(0).nonzero(), (k(3),))
        analysis = analyze(gm.graph, {placeholders(gm)[0]: K}, 3)
        assert set(analysis.values.values()) == {K}

    def test_batch_size_is_an_expression(self) -> None:
        gm = trace(lambda a: a.sum(1), (k(3, 4),), symbolic=True)
        (a,) = placeholders(gm)
        size = a.meta["val"].shape[0]
        assert analyze(gm.graph, {a: B0}, size).batch_size == size.node.expr


class TestTangents:
    """The joint graph's incoming gradients are what their outputs are."""

    def graph(self, output: Any) -> tuple[fx.GraphModule, dict, dict]:
        gm = trace(lambda a, t: (output(a), t * 2), (k(3, 4), k(3, 4)))
        a, t = placeholders(gm)
        (out,) = (node for node in gm.graph.nodes if node.op == "output")
        return gm, {a: B0}, {t: out.args[0][0]}

    def test_of_a_batched_output(self) -> None:
        gm, seeds, tangent_of = self.graph(lambda a: a.exp())
        analysis = analyze(gm.graph, seeds, 3, tangent_of)
        assert analysis[placeholders(gm)[1]] == B0
        assert analysis[named(gm, "mul")] == B0

    def test_of_a_loss(self) -> None:
        gm, seeds, tangent_of = self.graph(lambda a: a.sum())
        assert analyze(gm.graph, seeds, 3, tangent_of)[named(gm, "mul")] == K

    def test_of_a_mixed_output(self) -> None:
        gm, seeds, tangent_of = self.graph(lambda a: a.sum(0))
        analysis = analyze(gm.graph, seeds, 3, tangent_of)
        assert analysis[named(gm, "mul")] == Mixed(named(gm, "sum"), "sums over the batch axis")

    def test_that_nothing_reads(self) -> None:
        gm = trace(lambda a, t: a.exp(), (k(3, 4), k(3, 4)))
        a, t = placeholders(gm)
        assert analyze(gm.graph, {a: B0}, 3, {t: named(gm, "exp")})[t] == B0


class TestMixed:
    def test_keeps_its_origin(self) -> None:
        gm = trace(lambda a: (a.mean(0, keepdim=True) - a).exp(), (k(3, 4),))
        analysis = analyze(gm.graph, {placeholders(gm)[0]: B0}, 3)
        origin = next(n for n, v in analysis.values.items() if isinstance(v, Mixed))
        assert isinstance(analysis[named(gm, "exp")], Mixed)
        assert analysis[named(gm, "exp")].origin is origin

    def test_an_op_without_a_rule_is_named(self) -> None:
        gm = trace(lambda a: torch.histc(a, 4), (k(3),))
        histc = named(gm, "histc")
        analysis = analyze(gm.graph, {placeholders(gm)[0]: B0}, 3)
        assert analysis[histc] == Mixed(histc, "no batch-axis rule for aten.histc.default")

    def test_items_of_a_mixed_tuple(self) -> None:
        gm = trace(lambda a: torch.var_mean(a, 0)[1], (k(3, 4),), decompose=False)
        analysis = analyze(gm.graph, {placeholders(gm)[0]: B0}, 3)
        assert analysis[named(gm, "getitem_1")].reason == "takes the variance over the batch axis"

    @pytest.mark.parametrize(
        "fill",
        [
            torch.zeros_like,
            torch.rand_like,
            torch.empty_like,
            lambda a: a.new_zeros(2),
            lambda a: torch.full_like(a, 2.0),
            lambda a: torch.zeros(a.shape[0]),
        ],
    )
    @pytest.mark.parametrize("value", [B0, "mixed"])
    def test_a_shape_is_constant(self, fill: Any, value: Any) -> None:
        gm = trace(fill, (k(3, 4),), symbolic=True)
        (a,) = placeholders(gm)
        seed = Mixed(a, "x") if value == "mixed" else value
        last = list(gm.graph.nodes)[-2]
        assert analyze(gm.graph, {a: seed}, a.meta["val"].shape[0])[last] == K

    def test_a_shape_that_depends_on_data_is_not(self) -> None:
        def count(a: torch.Tensor) -> torch.Tensor:
            return torch.zeros(a.nonzero().shape[0] + 1)

        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            gm = trace(count, (k(3, 4),), symbolic=True)
        (a,) = placeholders(gm)
        analysis = analyze(gm.graph, {a: B0}, a.meta["val"].shape[0])
        assert isinstance(analysis[list(gm.graph.nodes)[-2]], Mixed)


class TestInPlaceWrites:
    """Joint graphs have few; being wrong about them would be a leak all the same."""

    def graph(self, *ops: tuple[Any, ...]) -> tuple[dict[str, fx.Node], Any]:
        """Chain ops whose arguments name earlier nodes; "c" is constant, "a" batched."""
        graph, nodes = fx.Graph(), {}
        for name in "ca":
            nodes[name] = graph.placeholder(name)
            nodes[name].meta["val"] = k(3, 3)
        for name, op, *args in ops:
            nodes[name] = graph.call_function(op, tuple(nodes.get(arg, arg) for arg in args))
            values = [nodes[a].meta["val"] if a in nodes else a for a in args]
            nodes[name].meta["val"] = op(*values)
        return nodes, analyze(graph, {nodes["c"]: K, nodes["a"]: B0}, 3)

    def test_the_result_has_a_value(self) -> None:
        nodes, analysis = self.graph(("w", aten.add_.Tensor, "c", "a"))
        assert analysis[nodes["w"]] == B0

    def test_a_later_read_is_refused(self) -> None:
        ops = [("w", aten.copy_.default, "c", "a"), ("r", aten.exp.default, "c")]
        nodes, analysis = self.graph(*ops)
        assert analysis[nodes["w"]] == B0
        assert analysis[nodes["r"]].reason == "reads c after it was overwritten in place"

    def test_a_write_through_a_view_too(self) -> None:
        nodes, analysis = self.graph(
            ("v", aten.select.int, "c", 0, 0),
            ("s", aten.select.int, "a", 1, 0),
            ("w", aten.copy_.default, "v", "s"),
            ("r", aten.exp.default, "c"),
        )
        assert isinstance(analysis[nodes["r"]], Mixed)

    def test_the_result_of_the_write_may_be_read(self) -> None:
        ops = [("w", aten.add_.Tensor, "c", "a"), ("r", aten.exp.default, "w")]
        nodes, analysis = self.graph(*ops)
        assert analysis[nodes["r"]] == B0

    def test_constant_writes_do_no_harm(self) -> None:
        ops = [("w", aten.exp_.default, "c"), ("r", aten.add.Tensor, "c", "a")]
        nodes, analysis = self.graph(*ops)
        assert analysis[nodes["r"]] == B0


def test_every_registered_op_exists() -> None:
    """A misspelt name would be an op without a rule."""
    unknown = [name for name in registry.ENTRIES if name[0] != "<" and not exists(name)]
    assert unknown == []


def exists(name: str) -> bool:
    found = torch.ops
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is not None


# They draw a varying count of random numbers per entry: one sample shifts the others' numbers.
REJECTION_SAMPLING = ("poisson", "binomial")


def elementwise_ops() -> Iterator[Any]:
    """Yield the functional ops that get the elementwise rule, by torch's tag or by our list."""
    for schema in torch._C._jit_get_all_schemas():
        namespace, _, name = schema.name.partition("::")
        if namespace not in ("aten", "prims") or schema.is_mutable or name in REJECTION_SAMPLING:
            continue
        packet = getattr(getattr(torch.ops, namespace), name, None)
        op = getattr(packet, schema.overload_name or "default", None)
        # Overloads on numbers, such as aten.add.int, have no tensors.
        if op is not None and any(str(a.type) == "Tensor" for a in schema.arguments):
            entry = registry.find(op)
            if entry is not None and entry.rule is registry.ENTRIES["<pointwise>"].rule:
                yield op


def arguments(op: Any, integer: bool) -> tuple[list[Any], dict[str, Any]]:
    """Make up arguments: batched tensors that broadcast, and small numbers."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for argument in op._schema.arguments:
        kind, value = str(argument.type), None
        if kind in ("Tensor", "Optional[Tensor]"):
            broadcasts = args and op.namespace == "aten" and "backward" not in op.__name__
            shape = (3,) if broadcasts else (4, 3)
            tensor = ints(*shape, high=4) + 1 if integer else k(*shape).abs() % 0.9 + 0.05
            value = at(tensor, len(shape) - 1)
        elif argument.has_default_value():
            continue
        elif kind in ("number", "float", "int", "Union[number]"):
            value = 1 if integer or kind == "int" else 0.5
        elif kind == "bool":
            value = True
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    return args, kwargs


def test_elementwise_ops_are() -> None:
    """Tag and list are words; here is the experiment, for every op that can be called so."""
    tried, refused = 0, []
    for op in elementwise_ops():
        for integer in (False, True):
            args, kwargs = arguments(op, integer)
            try:
                op(*(getattr(a, "tensor", a) for a in args), **kwargs)
            except (RuntimeError, TypeError, NotImplementedError):
                continue
            found = check_op(op, *args, **kwargs)
            tried += 1
            if found not in (batched(1), batched(0)):
                refused.append((op, found))
            break
    assert refused == []
    assert tried > 250


def test_comparing_whole_tensors_is_not_elementwise() -> None:
    assert torch.Tag.pointwise in aten.equal.default.tags
    assert registry.find(aten.equal.default) is None


def test_a_library_cannot_tag_its_way_in() -> None:
    with torch.library._scoped_library("batch_axis_test", "DEF") as library:
        library.define("mix(Tensor x) -> Tensor", tags=(torch.Tag.pointwise,))
        library.impl("mix", lambda t: t.flip(0), "CompositeExplicitAutograd")
        found = check_op(torch.ops.batch_axis_test.mix.default, x(3, 3))
    assert found == "no batch-axis rule for batch_axis_test.mix.default"


def test_a_claim_that_does_not_fit_the_shape_is_refused(monkeypatch: Any) -> None:
    wrong = registry.Entry(lambda call: Batched(0), batched=frozenset({"<first>"}))
    monkeypatch.setitem(registry.ENTRIES, "aten.exp.default", wrong)
    assert check_op(aten.exp.default, x(2, 3, dim=1)) == "no consistent batch axis in the result"


def test_numbers_computed_from_sizes_are_constant() -> None:
    gm = trace(lambda a: a * (a.shape[0] * a.shape[1] // 2), (k(3, 4),), symbolic=True)
    (a,) = placeholders(gm)
    analysis = analyze(gm.graph, {a: B0}, a.meta["val"].shape[0])
    numbers = [n for n in gm.graph.nodes if n.target in (operator.mul, operator.floordiv)]
    assert numbers
    assert {analysis[n] for n in numbers} == {K}
