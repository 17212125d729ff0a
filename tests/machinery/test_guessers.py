"""The two guessers that a backbone's masked accuracy is compared with."""
import torch

import vqkd
from model import ViT
from support.guessers import commonest_codes, guess_hidden, nearest_visible_code
from support.process import Process


def test_the_guesser_of_places_takes_the_commonest_code_of_each_place():
    class Tokenizer:                                         # an image of one colour is its code
        encoder = ViT(16, 8, 8, 1, 1, positions="absolute")
        quantize = vqkd.Codebook(4, 2)

        def encode(self, images):
            code = (images[:, 0, 0, 0] * 255).round().long()
            return (code[:, None] + torch.tensor([0, 0, 1, 0])).clamp(max=3)

    class OneProcess(Process):
        def eval_batches(self, dataset, batch_size):
            yield torch.utils.data.default_collate([dataset[i] for i in range(len(dataset))]), None

    codes = [0, 2, 2, 1, 2]
    dataset = [(torch.full((3, 16, 16), code, dtype=torch.uint8), 0) for code in codes]
    assert commonest_codes(Tokenizer(), dataset, OneProcess()).tolist() == [2, 2, 3, 2]


def test_the_nearest_visible_patch_lends_its_code():
    z = torch.arange(9)[None]
    mask = torch.tensor([[0, 0, 0, 0, 1, 1, 0, 0, 1]], dtype=torch.bool)
    guess = nearest_visible_code(z, mask, (3, 3))[0]
    assert torch.equal(guess[~mask[0]], z[0][~mask[0]])      # a visible patch is its own nearest
    assert guess[4] in (1, 3, 7)
    assert guess[5] == 2
    assert guess[8] == 7


def test_both_guessers_name_the_hidden_patches_in_the_order_of_the_logits():
    z = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    mask = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 1]], dtype=torch.bool)
    by_position, by_nearness = guess_hidden(z, mask, torch.tensor([10, 11, 12, 13]), (1, 4))
    assert by_position.tolist() == [10, 11, 13]
    assert by_nearness[0] == 1
    assert by_nearness[1] in (4, 6)
    assert by_nearness[2] == 6
