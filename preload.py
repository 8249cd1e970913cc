"""Command-line options of the webui extension; the host calls ``preload`` before it parses its own."""


def preload(parser):
    parser.add_argument(
        "--spectral-dir",
        default=None,
        help="folder with spectral adapters (default: models/spectral_adapters below the host's data folder)",
    )
