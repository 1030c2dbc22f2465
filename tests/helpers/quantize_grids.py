"""Every grid that onnxruntime runs, drawn by hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from edgedisp.quantize.grid import Grid

grids = st.builds(
    Grid, bits=st.sampled_from((4, 8)), group=st.sampled_from((16, 32, 64, 128, 256)), symmetric=st.booleans()
)
