import numpy as np

from maxstack.data.loader import Loader
from maxstack.data.pieces import text_pieces


def test_pieces_cover_a_row_and_show_its_documents(config, prepared):
    loader = Loader(config, prepared, batch_rows=4, seq_len=128)
    batch = loader.batch(0)
    for row in range(4):
        pieces = text_pieces(batch, row, prepared.tokenizer)
        assert [p.start for p in pieces] == [0, *(p.stop for p in pieces[:-1])]
        assert pieces[-1].stop == 128
        shown = "".join(p.text for p in pieces)
        assert shown == prepared.tokenizer.decode(batch.tokens[row], skip_special=False)
        for piece in pieces:
            assert (batch.segment_ids[row, piece.start : piece.stop] == piece.segment).all()
            assert (batch.weights[row, piece.start : piece.stop] == piece.weight).all()


def test_padding_has_no_text_and_masked_text_is_a_piece_of_its_own(config, prepared):
    batch = Loader(config, prepared, batch_rows=1, seq_len=16).batch(0)
    for part in batch:
        part[0, 12:] = 0
    batch.segment_ids[0, :12], batch.weights[0, :4], batch.weights[0, 4:12] = 1, 0, 1
    pieces = text_pieces(batch, 0, prepared.tokenizer)
    assert [(p.segment, p.weight, p.start, p.stop) for p in pieces] == [
        (1, 0, 0, 4),
        (1, 1, 4, 12),
        (0, 0, 12, 16),
    ]
    assert pieces[2].text == ""
    assert np.all([p.text for p in pieces[:2]])
