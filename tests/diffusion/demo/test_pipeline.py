from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from pipelines import editing, pictures

from lissom.diffusion.pictures import to_picture, to_pixels
from lissom.errors import UserError


@pytest.mark.parametrize(
    "options,words",
    [
        ({"num_inference_steps": 0}, "expected at least 1"),
        ({"height": 0}, "no multiple of 4"),
        ({"width": 18}, "no multiple of 4"),
        ({"prompt": []}, "There is no prompt"),
        ({"prompt": ["a", "red"], "negative_prompt": ["a"], "guidance_scale": 2.0}, "1 negative prompts for 2"),
        ({"image": []}, "0 references"),
        ({"image": "one.png"}, "expected a picture"),
        ({"image": Image.new("RGB", (3, 16))}, "smaller than a token"),
        ({"image": Image.new("I;16", (16, 16))}, "more than 8 bits"),
    ],
)
def test_bad_input_is_refused(options, words):
    with pytest.raises(UserError, match=words):
        editing()(**options)


def test_pictures_of_any_kind_are_seen_on_white():
    (picture,) = pictures(1)
    assert np.array_equal(np.asarray(to_picture(to_pixels(picture))), np.asarray(picture))
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert (to_pixels(clear) == 1).all()
    half = to_pixels(Image.new("LA", (16, 16), (0, 128)))
    assert abs(float(half.mean())) < 0.01
    marked = Image.new("P", (16, 16), 0)
    marked.info["transparency"] = 0
    assert (to_pixels(marked) == 1).all()
    assert to_pixels(Image.new("1", (8, 8), 1)).shape == (3, 8, 8)
