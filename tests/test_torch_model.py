import pytest
import torch

from cflow_plugin.errors import CflowError
from cflow_plugin.model.flow import log_likelihood
from cflow_plugin.model.torch_model import CflowModel


@pytest.fixture(scope="module", params=[128, 0], ids=["cflow", "uflow"])
def model(request):
    torch.manual_seed(0)
    model = CflowModel("resnet18", ["layer2", "layer3"], condition_dims=request.param, coupling_blocks=2).eval()
    with torch.no_grad():
        model.calibrate(model.log_likelihoods(torch.randn(2, 3, 64, 64)))
    return model


@pytest.mark.parametrize("batch_size", [1, 3, 12, pytest.param(32, marks=pytest.mark.long)])
def test_scores_do_not_depend_on_the_batch(model, batch_size):
    generator = torch.Generator().manual_seed(1)
    count = max(12, batch_size)
    images = torch.randn(count, 3, 64, 96, generator=generator)
    images[3] *= 20  # an extreme neighbour
    with torch.no_grad():
        alone = [model(image[None]) for image in images]
        order = torch.randperm(count, generator=generator)
        for chosen in order.split(batch_size):
            together = model(images[chosen])
            for row, index in enumerate(chosen):
                torch.testing.assert_close(together.anomaly_map[row], alone[index].anomaly_map[0], rtol=0, atol=1e-6)
                torch.testing.assert_close(together.pred_score[row], alone[index].pred_score[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(64, 64), (64, 128), (128, 64), (100, 77)])
def test_any_size(model, size):
    result = model(torch.randn(2, 3, *size))
    assert result.anomaly_map.shape == (2, 1, *size)
    assert result.pred_score.shape == (2,)
    assert torch.isfinite(result.anomaly_map).all()


def test_likelihoods_are_computed_vector_by_vector(model):
    images = torch.randn(2, 3, 64, 64)
    for decoder, features, values in zip(
        model.decoders, model.encoder(images), model.log_likelihoods(images), strict=True
    ):
        height, width = features.shape[-2:]
        row, column = 1, width - 1
        condition = model.condition(height, width, features)[[row * width + column]]
        expected = log_likelihood(*decoder(features[[1], :, row, column], [condition]))
        torch.testing.assert_close(values[1, row, column], expected[0], rtol=1e-4, atol=1e-4)


def test_an_untrained_model_says_so():
    with pytest.raises(CflowError, match="has not been trained"):
        CflowModel("gabor", ["scale1"])(torch.zeros(1, 3, 64, 64))
