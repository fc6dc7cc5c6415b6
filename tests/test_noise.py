"""flashnorm::add_noise: the generator, the distribution, the op and its kernels."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import torch
from interpreter import run_interpreted
from scipy import stats
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from flashnorm_compile.kernels.noise import add_noise, cpu, normal, philox_4x32, reference

HAS_TRITON = importlib.util.find_spec("triton") is not None

SEED, RELEASE = -1234567890123, 2**40 + 3
KEY = torch.tensor([SEED, RELEASE])
NOISE_SCALE, INV_EXPECTED_BATCH_SIZE = 0.7, 0.3
SCALARS = torch.tensor([1.0, NOISE_SCALE, INV_EXPECTED_BATCH_SIZE])
NO_NOISE = torch.tensor([1.0, 0.0, INV_EXPECTED_BATCH_SIZE])

DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
]
SHAPES = [(), (0,), (3, 0), (1,), (3,), (1023,), (1025,), (7, 5, 9), (2, 3, 4, 5), (37, 141)]

# The specification evaluates log, cos and sin in float32; a GPU's differ from it by a few ulp.
NORMAL_TOLERANCE = 2e-6


def all_layouts(tensor):
    """Tensors of the same values with every kind of strides."""
    yield tensor
    reverse = tuple(reversed(range(tensor.dim())))
    yield tensor.permute(reverse).contiguous().permute(reverse)
    if tensor.dim() == 4:
        yield tensor.to(memory_format=torch.channels_last)
        yield tensor.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)
    if tensor.dim() >= 1:
        yield tensor.repeat_interleave(2, dim=-1)[..., ::2]
        yield tensor[..., :1].expand(tensor.shape)


class TestPhilox:
    @pytest.mark.parametrize(
        ("counter", "key", "expected"),
        [
            (
                [0, 0, 0, 0],
                [0, 0],
                [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
            ),
            (
                [0xFFFFFFFF] * 4,
                [0xFFFFFFFF] * 2,
                [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
            ),
            (
                [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
                [0xA4093822, 0x299F31D0],
                [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
            ),
        ],
    )
    def test_matches_the_vectors_published_with_random123(self, counter, key, expected):
        assert philox_4x32(torch.tensor(counter), torch.tensor(key)).tolist() == expected

    def test_maps_a_batch_of_counters_one_by_one(self):
        counters = torch.randint(0, 2**32, (3, 5, 4))
        key = torch.tensor([1, 2])
        batch = philox_4x32(counters, key)
        assert batch.shape == counters.shape
        assert torch.equal(batch[2, 3], philox_4x32(counters[2, 3], key))

    @pytest.mark.parametrize("block", [0, 7, 2**32 - 1, 2**32, 2**43 + 5])
    def test_the_counter_packs_block_stream_and_release_without_collision(self, block):
        stream, release, seed = 2**20 - 1, 2**63 - 5, -2
        counter = [block % 2**32, stream * 2**12 + block // 2**32, 2**32 - 5, 2**31 - 1]
        words = philox_4x32(torch.tensor(counter), torch.tensor([2**32 - 2, 2**32 - 1]))
        expected = [
            *reference.box_muller(words[0], words[1]),
            *reference.box_muller(words[2], words[3]),
        ]
        chunk = cpu.normals(seed, release, stream, [cpu.Span(0, 4 * block, 4)])
        torch.testing.assert_close(chunk, torch.stack(expected))

    def test_no_uniform_is_zero_or_above_one(self):
        extremes = reference.uniform(torch.tensor([0, 2**32 - 1]))
        assert extremes.tolist() == [2.0**-33, 1.0]
        for radius_word in (0, 2**32 - 1):
            pair = reference.box_muller(torch.tensor([radius_word]), torch.tensor([0]))
            assert all(z.isfinite().all() for z in pair)


class TestDistribution:
    N = 1_000_000

    @pytest.fixture(scope="class")
    @classmethod
    def samples(cls):
        return normal(SEED, RELEASE, 3, (cls.N,)).double().numpy()

    def test_moments_are_those_of_a_standard_normal(self, samples):
        assert abs(samples.mean()) < 4 / np.sqrt(self.N)
        assert abs(samples.var() - 1) < 4 * np.sqrt(2 / self.N)
        assert abs(stats.skew(samples)) < 4 * np.sqrt(6 / self.N)
        assert abs(stats.kurtosis(samples)) < 4 * np.sqrt(24 / self.N)

    def test_distribution_function_is_the_normal_one(self, samples):
        assert stats.kstest(samples, "norm").pvalue > 1e-3
        for lane in range(4):
            assert stats.kstest(samples[lane::4], "norm").pvalue > 1e-3

    def test_tail_is_as_heavy_as_the_normal_one(self, samples):
        expected = 2 * stats.norm.sf(4.0) * self.N
        assert abs((np.abs(samples) > 4).sum() - expected) < 5 * np.sqrt(expected)

    def test_neighbouring_elements_are_uncorrelated_in_value_and_in_square(self, samples):
        for lag in range(1, 9):
            assert abs(correlation(samples[lag:], samples[:-lag])) < 5e-3
            assert abs(correlation(samples[lag:] ** 2, samples[:-lag] ** 2)) < 5e-3

    @pytest.mark.parametrize(
        ("seed", "release", "stream"),
        [
            (SEED, RELEASE, 4),
            (SEED, RELEASE, 2**20 - 1),
            (SEED, RELEASE + 1, 3),
            (SEED, RELEASE + 2**32, 3),
            (SEED + 1, RELEASE, 3),
            (SEED + 2**32, RELEASE, 3),
            (RELEASE, SEED, 3),
        ],
    )
    def test_another_seed_release_or_stream_is_independent(self, samples, seed, release, stream):
        other = normal(seed, release, stream, (200_000,)).double().numpy()
        ours = samples[:200_000]
        assert abs(correlation(ours, other)) < 5 / np.sqrt(200_000)
        assert (ours == other).sum() <= 2
        assert len(np.intersect1d(ours[:1000], other[:1000])) <= 1


def correlation(a, b):
    return np.corrcoef(a, b)[0, 1]


class TestNumbering:
    def test_a_prefix_does_not_depend_on_the_size(self):
        noise = normal(SEED, RELEASE, 3, (40_001,))
        for numel in (0, 1, 2, 5, 17, 999, 40_000):
            assert torch.equal(normal(SEED, RELEASE, 3, (numel,)), noise[:numel])

    def test_elements_are_numbered_in_row_major_order(self):
        flat = normal(SEED, RELEASE, 3, (60,))
        assert torch.equal(normal(SEED, RELEASE, 3, (3, 4, 5)), flat.view(3, 4, 5))

    def test_seed_and_release_may_be_tensors(self):
        by_tensor = normal(KEY[0], KEY[1], 3, (9,))
        assert torch.equal(by_tensor, normal(SEED, RELEASE, 3, (9,)))


class TestCpu:
    @pytest.mark.parametrize("chunk_blocks", [16, cpu.CHUNK_BLOCKS])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_is_bit_equal_to_the_reference(self, shape, chunk_blocks, monkeypatch):
        monkeypatch.setattr(cpu, "CHUNK_BLOCKS", chunk_blocks)
        for sum_dtype, out_dtype in DTYPES:
            for sum in all_layouts(torch.randn(shape).to(sum_dtype)):
                out = add_noise(sum, KEY, SCALARS, 5, out_dtype)
                expected = reference.add_noise(sum, KEY, SCALARS, 5, out_dtype)
                assert torch.equal(out, expected)
                assert out.dtype == expected.dtype == out_dtype
                assert out.stride() == torch.empty(shape).stride()

    def test_is_bit_equal_to_the_reference_over_several_chunks(self):
        sum = torch.randn(4 * cpu.CHUNK_BLOCKS + 7)
        out = add_noise(sum, KEY, SCALARS, 5, torch.float32)
        assert torch.equal(out, reference.add_noise(sum, KEY, SCALARS, 5, torch.float32))

    def test_is_the_formula(self):
        sum = torch.randn(50, 3)
        noise = normal(SEED, RELEASE, 5, (50, 3))
        expected = (sum + NOISE_SCALE * noise) * INV_EXPECTED_BATCH_SIZE
        torch.testing.assert_close(add_noise(sum, KEY, SCALARS, 5, torch.float32), expected)

    def test_strides_do_not_change_the_noise(self):
        sum = torch.randn(6, 4, 3, 5)
        expected = add_noise(sum, KEY, SCALARS, 5, torch.float32)
        channels_last = sum.to(memory_format=torch.channels_last)
        out = add_noise(channels_last, KEY, SCALARS, 5, torch.float32)
        assert torch.equal(out, expected)
        assert out.stride() == expected.stride()

    def test_the_same_arguments_give_the_same_noise(self):
        sum = torch.randn(100)
        first, second = (add_noise(sum, KEY, SCALARS, 5, torch.float32) for _ in range(2))
        assert torch.equal(first, second)
        assert first.data_ptr() != second.data_ptr()

    def test_bfloat16_sums_are_noised_in_float32(self):
        sum = torch.full((1000,), 256.0, dtype=torch.bfloat16)
        unrounded = add_noise(sum.float(), KEY, SCALARS, 5, torch.float32)
        assert torch.equal(add_noise(sum, KEY, SCALARS, 5, torch.float32), unrounded)
        assert torch.equal(add_noise(sum, KEY, SCALARS, 5, torch.bfloat16), unrounded.bfloat16())

    def test_float64_sums_keep_their_precision(self):
        sum = torch.tensor([1 + 2.0**-40], dtype=torch.float64)
        scalars = torch.tensor([1.0, 0.0, 1.0])
        assert torch.equal(add_noise(sum, KEY, scalars, 5, torch.float64), sum)


class TestZeroScale:
    def test_nothing_but_the_division_happens(self):
        sum = torch.randn(1000)
        out = add_noise(sum, KEY, NO_NOISE, 5, torch.float32)
        assert torch.equal(out, sum * INV_EXPECTED_BATCH_SIZE)
        quarter = torch.tensor([1.0, 0.0, 0.25])
        assert torch.equal(add_noise(sum, KEY, quarter, 5, torch.float32), sum / 4)

    def test_makes_no_random_numbers(self, monkeypatch):
        monkeypatch.setattr(cpu, "normals", None)
        add_noise(torch.randn(10), KEY, NO_NOISE, 5, torch.float32)


class TestTracing:
    @pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("shape", [(), (0,), (4, 5), (2, 3, 4, 5)])
    def test_the_fake_result_agrees_with_the_real_one(self, shape, out_dtype):
        for sum in all_layouts(torch.randn(shape)):
            torch.library.opcheck(add_noise, (sum, KEY, SCALARS, 5, out_dtype))
            with FakeTensorMode() as mode:
                fake = [mode.from_tensor(tensor) for tensor in (sum, KEY, SCALARS)]
                result = add_noise(*fake, 5, out_dtype)
            real = add_noise(sum, KEY, SCALARS, 5, out_dtype)
            assert (result.shape, result.stride(), result.dtype) == (
                real.shape,
                real.stride(),
                real.dtype,
            )

    def test_make_fx_records_one_node(self):
        def release(sum, key, scalars):
            return torch.ops.flashnorm.add_noise(sum, key, scalars, 5, torch.bfloat16)

        sum = torch.randn(4, 5)
        graph = make_fx(release, tracing_mode="fake")(sum, KEY, SCALARS)
        calls = [node for node in graph.graph.nodes if node.op == "call_function"]
        assert [node.target for node in calls] == [torch.ops.flashnorm.add_noise.default]
        assert torch.equal(graph(sum, KEY, SCALARS), release(sum, KEY, SCALARS))

    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_streams_keep_equal_calls_apart_in_a_compiled_graph(self, backend):
        """CSE merges calls whose arguments are all equal; the stream makes them differ."""

        def release(a, key, scalars):
            sum = (a * 2).t()
            return [
                torch.ops.flashnorm.add_noise(sum, key, scalars, stream, torch.float32) + 1
                for stream in (0, 1)
            ]

        a = torch.randn(40, 30)
        compiled = torch.compile(release, backend=backend, fullgraph=True)
        first, second = compiled(a, KEY, SCALARS)
        expected_first, expected_second = release(a, KEY, SCALARS)
        torch.testing.assert_close(first, expected_first)
        torch.testing.assert_close(second, expected_second)
        assert not torch.isclose(first, second).any(dim=0).all()
        assert first.stride() == expected_first.stride()

        next_release = compiled(a, KEY + torch.tensor([0, 1]), SCALARS)
        assert not torch.allclose(next_release[0], first)


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"sum": torch.ones(3, dtype=torch.int64)}, "sum.dtype is torch.int64; expected a"),
            ({"out_dtype": torch.int32}, "out_dtype is torch.int32; expected a real floating"),
            ({"key": torch.ones(2)}, r"key is torch.float32 \[2\]; expected torch.int64 \[2\]"),
            ({"scalars": torch.ones(2)}, r"\[2\]; expected torch.float32 \[3\]"),
            ({"stream": 2**20}, r"stream is 1048576; expected 0 <= stream < 2\*\*20"),
            ({"stream": -1}, "stream is -1; expected 0 <= stream"),
            ({"key": KEY.to("meta")}, "key is on meta and sum on cpu; expected one device"),
        ],
    )
    def test_name_the_argument_what_was_found_and_what_is_valid(self, change, message):
        valid = {
            "sum": torch.ones(3),
            "key": KEY,
            "scalars": SCALARS,
            "stream": 0,
            "out_dtype": torch.float32,
        }
        with pytest.raises(ValueError, match=message):
            add_noise(**(valid | change))


def check_kernel(device):
    """Compare the Triton kernel with the reference; the interpreter runs it on the CPU."""
    from flashnorm_compile.kernels.noise import kernel

    def compare(sum, scalars, stream, out_dtype):
        inputs = (tensor.to(device) for tensor in (sum, KEY, scalars))
        out = kernel.add_noise(*inputs, stream, out_dtype)
        expected = reference.add_noise(sum, KEY, scalars, stream, out_dtype)
        assert (out.stride(), out.dtype) == (expected.stride(), out_dtype)
        tolerance = {"atol": NORMAL_TOLERANCE, "rtol": NORMAL_TOLERANCE}
        if out_dtype in (torch.bfloat16, torch.float16):
            tolerance = {"atol": 1e-2, "rtol": 1e-2}
        torch.testing.assert_close(out.cpu(), expected, **tolerance)

    for shape in SHAPES:
        for sum in all_layouts(torch.randn(shape)):
            compare(sum, SCALARS, 0, torch.float32)
            compare(sum, NO_NOISE, 1, torch.float32)
    for sum_dtype, out_dtype in DTYPES:
        compare(torch.randn(37, 41).to(sum_dtype), SCALARS, 2**20 - 1, out_dtype)
        compare(torch.randn(41, 37).to(sum_dtype).t(), SCALARS, 16, out_dtype)


if HAS_TRITON:
    import triton
    import triton.language as tl

    from flashnorm_compile.kernels.noise.kernel import _box_muller

    @triton.jit
    def _box_muller_kernel(words_ptr, normals_ptr, N: tl.constexpr):
        i = tl.arange(0, N)
        radius_word = tl.load(words_ptr + i).to(tl.uint32)
        z0, z1 = _box_muller(radius_word, tl.load(words_ptr + N + i).to(tl.uint32))
        tl.store(normals_ptr + i, z0)
        tl.store(normals_ptr + N + i, z1)


def check_box_muller(device):
    """The kernel's polynomials are as precise as float32, in the tail and next to 0 as well."""
    edges = [(k * 2**29 + j) % 2**32 for k in range(8) for j in (-2, -1, 0, 1)]
    powers = [2**k for k in range(32)]
    some = torch.tensor(edges + powers)
    words = torch.stack((some.repeat(64), some.repeat_interleave(64)))
    found = torch.empty(2, 4096, device=device)
    _box_muller_kernel[(1,)](words.to(device), found, N=4096)

    radius = torch.sqrt(-2 * torch.log(reference.uniform(words[0]).double()))
    angle = 2 * torch.pi * (words[1].double() + 0.5) / 2**32
    expected = torch.stack((radius * angle.cos(), radius * angle.sin()))
    assert radius.max() > 6.76
    assert ((found.cpu() - expected).abs() <= 6e-7 * radius).all()


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_kernel_equals_reference_in_the_interpreter():
    run_interpreted("import test_noise as t; t.check_kernel('cpu'); t.check_box_muller('cpu')")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestCuda:
    def test_kernel_equals_reference(self):
        check_kernel("cuda")
        check_box_muller("cuda")

    def test_the_op_launches_the_kernel_without_synchronising(self):
        sum, key, scalars = (t.cuda() for t in (torch.randn(1000, 333), KEY, SCALARS))
        add_noise(sum, key, scalars, 7, torch.float32)
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = add_noise(sum, key, scalars, 7, torch.float32)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        expected = add_noise(sum.cpu(), KEY, SCALARS, 7, torch.float32)
        torch.testing.assert_close(
            out.cpu(), expected, atol=NORMAL_TOLERANCE, rtol=NORMAL_TOLERANCE
        )

    def test_elements_beyond_2_to_31_are_noised(self):
        numel = 2**31 + 4097
        sum = torch.zeros(numel, device="cuda", dtype=torch.bfloat16)
        out = add_noise(sum, KEY.cuda(), torch.tensor([1.0, 1.0, 1.0]).cuda(), 7, torch.bfloat16)
        tail = cpu.normals(SEED, RELEASE, 7, [cpu.Span(0, 2**31, 4097)])[:4097]
        torch.testing.assert_close(out[2**31 :].float().cpu(), tail, atol=1e-2, rtol=1e-2)


def test_importing_the_package_does_not_import_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import flashnorm_compile.kernels.noise as noise, torch\n"
        "key, scalars = torch.tensor([1, 2]), torch.ones(3)\n"
        "noise.add_noise(torch.ones(3), key, scalars, 0, torch.float32)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
