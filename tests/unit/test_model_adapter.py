"""The adapter to a language model and the splice at the placeholders."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cogvit.model.adapter import MLPAdapter, insert_visual_tokens_mmtp

IMAGE = 7


def mlp(adapter: MLPAdapter, x: torch.Tensor) -> torch.Tensor:
    return adapter.fc2(F.gelu(adapter.fc1(x)))


class TestAdapter:
    def test_groups_are_neighbors_in_raster_order(self) -> None:
        adapter = MLPAdapter(3, 5, hidden_dim=8, spatial_pool=2)
        tokens = torch.randn(2, 4 * 6, 3)
        image = tokens.view(2, 4, 6, 3)
        groups = [
            torch.cat([image[:, r, c], image[:, r, c + 1], image[:, r + 1, c], image[:, r + 1, c + 1]], dim=1)
            for r in (0, 2)
            for c in (0, 2, 4)
        ]
        torch.testing.assert_close(adapter(tokens, (4, 6)), mlp(adapter, torch.stack(groups, dim=1)))

    def test_without_pooling_it_is_the_mlp(self) -> None:
        adapter = MLPAdapter(3, 5)
        tokens = torch.randn(2, 6, 3)
        assert adapter.fc1.out_features == 5
        torch.testing.assert_close(adapter(tokens, (2, 3)), mlp(adapter, tokens))

    def test_odd_grids_are_completed_with_zeros(self) -> None:
        adapter = MLPAdapter(3, 5, spatial_pool=2)
        tokens = torch.randn(1, 3 * 5, 3)
        padded = F.pad(tokens.view(1, 3, 5, 3), (0, 0, 0, 1, 0, 1)).flatten(1, 2)
        torch.testing.assert_close(adapter(tokens, (3, 5)), adapter(padded, (4, 6)))

    def test_padding_changes_nothing_and_is_told(self) -> None:
        adapter = MLPAdapter(3, 5, spatial_pool=2)
        own = torch.randn(1, 3 * 2, 3)
        canvas, valid = torch.randn(1, 4, 6, 3), torch.zeros(1, 4, 6, dtype=torch.bool)
        canvas[:, :3, :2] = own.view(1, 3, 2, 3)
        valid[:, :3, :2] = True
        batch = canvas.flatten(1, 2), (4, 6), valid.flatten(1)
        real = adapter.valid_groups(*batch)
        assert real.tolist() == [[True, False, False, True, False, False]]
        out = adapter(*batch)
        torch.testing.assert_close(out[real], adapter(own, (3, 2))[0])
        assert not out[~real].any()

    def test_images_of_different_grids(self) -> None:
        adapter = MLPAdapter(3, 5, spatial_pool=2)
        tokens = torch.randn(2, 8, 3)
        valid = torch.tensor([[True] * 8, [True] * 6 + [False] * 2])
        out = adapter(tokens, [(2, 4), (3, 2)], valid)
        assert adapter.valid_groups(tokens, [(2, 4), (3, 2)], valid).tolist() == [[True, True], [True, True]]
        torch.testing.assert_close(out[0], adapter(tokens[:1], (2, 4))[0])
        torch.testing.assert_close(out[1], adapter(tokens[1:, :6], (3, 2))[0])

    def test_gradients_reach_every_patch(self) -> None:
        tokens = torch.randn(1, 9, 3, requires_grad=True)
        MLPAdapter(3, 5, spatial_pool=2)(tokens, (3, 3)).sum().backward()
        assert tokens.grad is not None
        assert tokens.grad.abs().sum(2).min() > 0

    def test_bad_input(self) -> None:
        adapter = MLPAdapter(3, 5, spatial_pool=2)
        tokens = torch.randn(2, 6, 3)
        with pytest.raises(ValueError, match="spatial_pool=0"):
            MLPAdapter(3, 5, spatial_pool=0)
        with pytest.raises(ValueError, match=r"grid \(2, 4\) does not match the 6"):
            adapter(tokens, (2, 4))
        with pytest.raises(ValueError, match=r"\[\(2, 3\)\] do not match 2 images"):
            adapter(tokens, [(2, 3)])
        with pytest.raises(ValueError, match=r"valid_mask has shape \(2, 5\); expected \(2, 6\)"):
            adapter(tokens, (2, 3), torch.ones(2, 5, dtype=torch.bool))
        for wrong in (tokens[0], torch.randn(2, 6, 4)):
            with pytest.raises(ValueError, match=r"patch tokens have shape .*; expected \(B, N, 3\)"):
                adapter(wrong, (2, 3))


class TestInsert:
    text = torch.zeros(3, 4, 2)

    def test_rows_with_one_without_and_with_two_images(self) -> None:
        ids = torch.tensor([[1, IMAGE, IMAGE, 2], [1, 2, 3, 4], [IMAGE, 1, 2, IMAGE]])
        visual = torch.arange(12.0).view(3, 2, 2) + 1
        out = insert_visual_tokens_mmtp(self.text, visual, IMAGE, ids)
        assert out[0].tolist() == [[0, 0], [1, 2], [3, 4], [0, 0]]
        assert not out[1].any()
        assert out[2].tolist() == [[9, 10], [0, 0], [0, 0], [11, 12]]
        assert not self.text.any()

    def test_ragged_counts(self) -> None:
        ids = torch.tensor([[IMAGE, IMAGE, IMAGE, 2], [1, 2, 3, 4], [1, 1, 2, IMAGE]])
        ragged = [torch.full((3, 2), 5.0), torch.zeros(0, 2), torch.full((1, 2), 6.0)]
        out = insert_visual_tokens_mmtp(self.text, ragged, IMAGE, ids)
        assert out[:, :, 0].tolist() == [[5, 5, 5, 0], [0, 0, 0, 0], [0, 0, 0, 6]]
        padded = torch.zeros(3, 3, 2)
        padded[0], padded[2, 1] = 5.0, 6.0
        mask = torch.tensor([[True] * 3, [False] * 3, [False, True, False]])
        assert torch.equal(insert_visual_tokens_mmtp(self.text, padded, IMAGE, ids, visual_mask=mask), out)
        assert torch.equal(insert_visual_tokens_mmtp(self.text, padded, IMAGE, ids, visual_mask=mask.int()), out)

    def test_gradients_reach_text_and_vision(self) -> None:
        text = torch.zeros(1, 3, 2, requires_grad=True)
        visual = torch.ones(1, 1, 2, requires_grad=True)
        insert_visual_tokens_mmtp(text, visual, IMAGE, torch.tensor([[1, IMAGE, 2]])).sum().backward()
        assert text.grad is not None
        assert text.grad[0, :, 0].tolist() == [1, 0, 1]
        assert visual.grad is not None
        assert visual.grad.tolist() == [[[1, 1]]]

    def test_no_placeholder_at_all(self) -> None:
        ids = torch.ones(3, 4, dtype=torch.int64)
        assert torch.equal(insert_visual_tokens_mmtp(self.text, torch.ones(3, 2, 2), IMAGE, ids), self.text)

    def test_bad_input(self) -> None:
        ids = torch.tensor([[1, IMAGE, IMAGE, 2]] * 3)
        with pytest.raises(ValueError, match=r"\[2, 2, 2\] <\|image\|> placeholders for \[3, 3, 3\]"):
            insert_visual_tokens_mmtp(self.text, torch.ones(3, 3, 2), IMAGE, ids)
        with pytest.raises(ValueError, match=r"must share \(B, T\)"):
            insert_visual_tokens_mmtp(self.text, torch.ones(3, 2, 2), IMAGE, ids[:, :3])
        with pytest.raises(ValueError, match=r"\(2, 5\), \(2, 5\)\]; expected \(V, 2\)"):
            insert_visual_tokens_mmtp(self.text, torch.ones(3, 2, 5), IMAGE, ids)
        with pytest.raises(ValueError, match=r"visual_mask has shape \(3, 4\); expected one value for each"):
            insert_visual_tokens_mmtp(self.text, torch.ones(3, 2, 2), IMAGE, ids, torch.ones(3, 4, dtype=torch.bool))
        with pytest.raises(ValueError, match="has 2 rows; expected 3"):
            insert_visual_tokens_mmtp(self.text, torch.ones(2, 2, 2), IMAGE, ids)
