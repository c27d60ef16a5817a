"""How much of what comes from others is read, and how much work it may cost: the same in every verb.

Over a limit a sample is bad, and counted by its name; a file that stands for many samples is refused. The limits are far above what
honest data needs; pixels of an image have a key of their own, `data.max_image_pixels`.
"""

ROW_BYTES = 4 * 2**20
"""Of a row of JSON."""
ROW_IMAGES = 1000
"""Of a row."""
IMAGE_BYTES = 256 * 2**20
"""Of an image's file, whatever it has behind its picture."""
PARQUET_ROWS = 10**7
"""Of a file."""
PARQUET_MEMORY = 4 * 2**30
"""What reading a row of a file may take beside what the process has, on Linux: a file of 600 bytes can unpack to terabytes."""
IMAGE_SCANS = 20
"""Passes over data.max_image_pixels pixels that a JPEG may take; a progressive one has some ten of its own."""
VIDEO_BYTES = 2**31
"""Of a video's file."""
VIDEO_PACKETS = 4 * 10**6
"""Of a video's file, sound among them; an hour has some 300,000."""
VIDEO_SECONDS = 24 * 60 * 60
"""Of a video."""
VIDEO_PIXELS = 10**11
"""Of frames that are decoded to come to those that are wanted: minutes of work. A frame costs as many as lie between two key frames."""
SAMPLE_BYTES = 2**30
"""Of all members of a sample."""
META_BYTES = 16 * 2**20
"""Of an index in JSON."""
CONFIG_BYTES = 2**16
"""Of a configuration or a sweep, which name what is long, such as data; with a comment on every key one has 9 kB."""
MECHANISM_ROWS = 1000
"""Of a mechanism's table that override others, and of any of its lists."""
SCHEDULE = 100
"""Entries of a schedule of mechanisms, each of which is read as a configuration is."""
YAML_BYTES = 2**20
"""Of a recipe, a list of splits, a suite, whose reader takes some seconds for it."""
YAML_LEVELS = 20
"""Of nesting in any of these."""
SOURCES = 1000
"""Of a recipe."""
SHARDS = 10**6
"""Of a folder."""
TAR_TAIL = 4 * 2**20
"""Bytes of zeros that end a tar; tar itself writes up to 10,240."""
TEMPLATE_CHARACTERS = 2**18
"""Of a chat template."""
RENDER_ALWAYS = 2 * 10**7
"""What a chat template may spend on any conversation: steps of loops at 100, characters at 1; half a second or so."""
RENDER_PER_CHARACTER = 1000
"""The same, for every character of the conversation."""
REQUEST_BYTES = 32 * 2**20
"""Of a request to `serve` or `demo-web`, pictures in base64 among them."""
REQUEST_CHARACTERS = 2**20
"""Of all texts in it, which take a second or so to be tokenised."""
REQUEST_MESSAGES = 1000
"""Of its conversation."""
REQUEST_SECONDS = 60
"""In which it must have been sent."""
CONNECTIONS = 64
"""Open at a time, those that wait for an answer among them; more are told to come back later."""
