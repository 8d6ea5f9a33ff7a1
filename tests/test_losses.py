"""Losses against recordings of the original program, and properties that hold for any input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden

from pisa_jax import losses

SCHEDULE = losses.ddpm_schedule()


def nhwc(array):
    return jnp.asarray(array.transpose(0, 2, 3, 1))


@pytest.fixture(scope="module")
def recorded():
    with np.load(golden("train/csd.npz")) as archive:
        return dict(archive)


def case(recorded, i):
    """Return latents, noise, t and the recorded pair of UNet outputs of one batch, NHWC."""
    neg, pos = np.split(recorded[f"eps_neg_then_pos{i}"], 2)
    return (
        nhwc(recorded[f"latents{i}"]),
        nhwc(recorded[f"noise{i}"]),
        jnp.asarray(recorded[f"t{i}"]),
        nhwc(neg),
        nhwc(pos),
    )


def test_schedule_is_the_originals():
    with np.load(golden("comp/scheduler.npz")) as expected:
        np.testing.assert_allclose(SCHEDULE.betas, expected["betas"], rtol=2e-6)
        np.testing.assert_allclose(SCHEDULE.alphas_cumprod, expected["alphas_cumprod"], rtol=1e-5)


def test_schedule_refuses_impossible_betas():
    with pytest.raises(ValueError, match="0 < start <= end < 1"):
        losses.ddpm_schedule(0.02, 0.01)


def test_add_noise_and_predict_x0_at_first_middle_and_last_step(recorded):
    sample, eps, t = nhwc(recorded["mu_sample"]), nhwc(recorded["mu_eps"]), jnp.asarray(recorded["mu_t"])
    assert t.tolist() == [0, 250, 999]
    noisy = losses.add_noise(sample, eps, t, SCHEDULE.alphas_cumprod)
    np.testing.assert_allclose(noisy, nhwc(recorded["addnoise_out"]), atol=1e-5)
    x0 = losses.predict_x0(sample, eps, t, SCHEDULE.alphas_cumprod)
    np.testing.assert_allclose(x0, nhwc(recorded["mu_out"]), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(losses.predict_x0(noisy, eps, t, SCHEDULE.alphas_cumprod), sample, atol=1e-4)


def test_smooth_l2_sees_smooth_errors_alone():
    y = jax.random.normal(jax.random.key(0), (2, 6, 7, 3))
    checkers = jnp.indices((6, 7)).sum(0)[None, :, :, None] % 2 * 2.0 - 1
    assert float(losses.smooth_l2(y + 0.5, y, 3)) == pytest.approx(0.25, rel=1e-5)
    assert float(losses.smooth_l2(y + checkers, y, 2)) == pytest.approx(0, abs=1e-12)
    # Five of one sign and four of the other.
    assert float(losses.smooth_l2(y + checkers, y, 3)) == pytest.approx(1 / 81, rel=1e-5)
    assert float(losses.smooth_l2(2 * y, y, 1)) == pytest.approx(float(jnp.mean(y**2)), rel=1e-6)


@pytest.mark.parametrize(("name", "guidance"), [("cfg7p5", 7.5), ("cfg1", 1.0)])
@pytest.mark.parametrize("i", [0, 1])
def test_csd_equals_the_original(recorded, i, name, guidance):
    latents, noise, t, neg, pos = case(recorded, i)
    seen = []

    def eps_fn(noisy, steps):
        seen.append((noisy, steps))
        return neg, pos

    loss, gradient = jax.value_and_grad(losses.csd, argnums=1)(
        eps_fn, latents, noise, t, SCHEDULE.alphas_cumprod, guidance
    )
    assert len(seen) == 1
    np.testing.assert_allclose(seen[0][0], nhwc(recorded[f"noisy{i}"]), atol=1e-5)
    np.testing.assert_array_equal(seen[0][1], recorded[f"t{i}"])
    np.testing.assert_allclose(loss, recorded[f"loss{i}_{name}"], rtol=1e-5)
    expected = nhwc(recorded[f"grad{i}_{name}"])
    np.testing.assert_allclose(gradient, expected, atol=1e-5 * float(jnp.abs(expected).max()))

    real = losses.predict_x0(seen[0][0], neg + guidance * (pos - neg), t, SCHEDULE.alphas_cumprod)
    np.testing.assert_allclose(real, nhwc(recorded[f"x0_real{i}_{name}"]), atol=5e-5)
    weight = jnp.abs(latents - real).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(weight, recorded[f"weight{i}_{name}"].ravel(), rtol=1e-5)


def test_csd_gradient_is_two_g_over_numel_to_the_last_bit(recorded):
    latents, noise, t, neg, pos = case(recorded, 1)
    arguments = (lambda z, t: (neg, pos), latents, noise, t, SCHEDULE.alphas_cumprod, 7.5)
    gradient = jax.grad(losses.csd, argnums=1)(*arguments)
    direction = losses.csd_direction(*arguments)
    np.testing.assert_allclose(gradient, 2 * direction / latents.size, rtol=3e-7)


def test_csd_sends_no_gradient_into_eps_fn_nor_through_the_noise(recorded):
    latents, noise, t, neg, pos = case(recorded, 0)

    def loss(scale, noise):
        return losses.csd(lambda z, t: (scale * neg + z, scale * pos), latents, noise, t, SCHEDULE.alphas_cumprod)

    by_weight, by_noise = jax.grad(loss, argnums=(0, 1))(jnp.float32(1.0), noise)
    assert by_weight == 0
    assert not by_noise.any()


def test_csd_weight_is_per_sample(recorded):
    latents, noise, t, neg, pos = case(recorded, 0)

    def alone(k):
        rows = slice(k, k + 1)
        return losses.csd_direction(
            lambda z, t: (neg[rows], pos[rows]), latents[rows], noise[rows], t[rows], SCHEDULE.alphas_cumprod, 7.5
        )

    both = losses.csd_direction(lambda z, t: (neg, pos), latents, noise, t, SCHEDULE.alphas_cumprod, 7.5)
    np.testing.assert_allclose(jnp.concatenate([alone(0), alone(1)]), both, rtol=1e-6)


def test_bfloat16_latents_are_computed_in_float32(recorded):
    latents, noise, t, neg, pos = (x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x for x in case(recorded, 0))
    dtypes = []

    def eps_fn(noisy, steps):
        dtypes.append(noisy.dtype)
        return neg, pos

    loss, gradient = jax.value_and_grad(losses.csd, argnums=1)(eps_fn, latents, noise, t, SCHEDULE.alphas_cumprod)
    assert dtypes == [jnp.bfloat16]
    assert (loss.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16)
    assert jnp.isfinite(gradient).all()
    np.testing.assert_allclose(loss, recorded["loss0_cfg7p5"], rtol=0.05)


def test_csd_under_jit_with_traced_guidance_does_not_retrace(recorded):
    latents, noise, t, neg, pos = case(recorded, 0)
    traces = []

    @jax.jit
    def loss(latents, guidance):
        traces.append(1)
        return losses.csd(lambda z, t: (neg, pos), latents, noise, t, SCHEDULE.alphas_cumprod, guidance)

    np.testing.assert_allclose(loss(latents, jnp.float32(7.5)), recorded["loss0_cfg7p5"], rtol=1e-5)
    np.testing.assert_allclose(loss(latents, jnp.float32(1.0)), recorded["loss0_cfg1"], rtol=1e-5)
    assert len(traces) == 1


def test_l2_is_the_mean_square_in_float32():
    x, y = jnp.array([[0.0, 1.0], [2.0, 3.0]]), jnp.array([[0.0, 0.0], [0.0, 1.0]])
    assert losses.l2(x, y) == (0 + 1 + 4 + 4) / 4
    np.testing.assert_array_equal(jax.grad(losses.l2)(x, y), 2 * (x - y) / 4)
    # 4096 values of 1 + 2^-7 squared: a bfloat16 sum would stop growing long before the end
    ones = jnp.full((4096,), 1.0078125, jnp.bfloat16)
    np.testing.assert_allclose(losses.l2(ones, jnp.zeros_like(ones)), 1.0078125**2, rtol=1e-6)
