"""`teemate image`: build, info, measure, key, sign, verify."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ._output import NUMBER, SIZE, json_option, print_json

__all__ = ["image"]

_F = TypeVar("_F", bound=Callable[..., Any])
_EXISTING = click.Path(exists=True, dir_okay=False, path_type=Path)
_PATH = click.Path(dir_okay=False, path_type=Path)


def signing_options(command: _F) -> _F:
    """Add the options that say what a signature permits; see :func:`_sig_params`."""
    options = [
        click.option("--isvprodid", type=NUMBER, default=0, show_default=True, help="Product's number."),
        click.option("--isvsvn", type=NUMBER, default=0, show_default=True, help="Security version."),
        click.option(
            "--date",
            type=click.DateTime(["%Y-%m-%d"]),
            default="2000-01-01",
            show_default=True,
            help="Date in the signature; fixed, so that signing again gives the same bytes.",
        ),
        click.option("--vendor", type=NUMBER, default=0, show_default=True, help="0, or 0x8086 for Intel."),
        click.option("--swdefined", type=NUMBER, default=0, show_default=True, help="Yours to use."),
        click.option(
            "--debug-allowed/--no-debug-allowed",
            default=None,
            help="Permit enclaves whose memory a debugger can read. Default: for images built with --debug.",
        ),
        click.option("--provision-key", is_flag=True, help="Permit access to provisioning keys."),
        click.option("--exinfo", is_flag=True, help="Exact fault addresses in SSA frames (CPUs with SGX2)."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _sig_params(values: dict[str, Any], *, debug_image: bool) -> Any:
    from ..image.sigstruct import SigParams

    date: datetime.datetime = values["date"]
    allowed = values["debug_allowed"]
    return SigParams(
        isvprodid=values["isvprodid"],
        isvsvn=values["isvsvn"],
        date=date.date(),
        vendor=values["vendor"],
        swdefined=values["swdefined"],
        debug_allowed=debug_image if allowed is None else allowed,
        provision_key=values["provision_key"],
        exinfo=values["exinfo"],
    )


@click.group()
def image() -> None:
    """Build, sign, verify and look at enclave images.

    An image is an SGXS file and its SIGSTRUCT; OUT.elf beside them is for finding the
    function and line of a fault.
    """


@image.command()
@click.argument("sources", nargs=-1, type=_EXISTING, metavar="SRC...")
@click.option("-o", "--output", type=_PATH, required=True, metavar="OUT.sgxs", help="The image to write.")
@click.option("--elf", type=_EXISTING, metavar="READY.elf", help="Lay out this ELF; compile nothing.")
@click.option("--slots", type=NUMBER, default=8, show_default=True, help="Slots for clients.")
@click.option("--io-slots", type=NUMBER, default=0, show_default=True, help="Slots for the warden's I/O.")
@click.option("--stack", type=SIZE, default="64K", show_default=True, help="Stack of each slot.")
@click.option("--heap", type=SIZE, default="1M", show_default=True, help="Heap of the enclave.")
@click.option("--nssa", type=NUMBER, default=3, show_default=True, help="SSA frames of each slot.")
@click.option("--debug", is_flag=True, help="Debug image: prints and faulting addresses leave the enclave.")
@click.option("--time", "wants_time", is_flag=True, help="The warden tells the enclave the time of day.")
@click.option("--measure-heap", is_flag=True, help="Measure the heap's zeros too; images become larger.")
@click.option("--bare", is_flag=True, help="No SDK: the sources bring their own entry, _start.")
@click.option(
    "-D", "--define", "defines", multiple=True, metavar="NAME[=VALUE]", help="For the C preprocessor."
)
@click.option(
    "-I",
    "--include",
    "includes",
    multiple=True,
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where headers are looked for.",
)  # fmt: skip
@click.option("--key", type=_EXISTING, metavar="KEY.pem", help="Sign with this key; writes OUT.sig.")
@signing_options
@json_option
def build(
    sources: tuple[Path, ...],
    output: Path,
    elf: Path | None,
    slots: int,
    io_slots: int,
    stack: int,
    heap: int,
    nssa: int,
    debug: bool,
    wants_time: bool,
    measure_heap: bool,
    bare: bool,
    defines: tuple[str, ...],
    includes: tuple[Path, ...],
    key: Path | None,
    as_json: bool,
    **signing: Any,
) -> None:
    """Compile SRC... against the SDK and write OUT.sgxs and OUT.elf, with --key OUT.sig as well.

    The same sources and options give the same bytes everywhere.
    """
    from ..image.build import build_image, layout_image
    from ..image.layout import LayoutOptions

    if bool(sources) == (elf is not None):
        raise click.UsageError("give either sources to compile, or a ready ELF with --elf")
    if output.suffix != ".sgxs":
        raise click.UsageError(
            f"{output}: the name of an image ends in .sgxs; OUT.elf and OUT.sig go beside it"
        )
    options = LayoutOptions(
        slots=slots,
        io_slots=io_slots,
        stack=stack,
        heap=heap,
        nssa=nssa,
        debug=debug,
        time=wants_time,
        measure_heap=measure_heap,
    )
    loaded = _load_key(key)  # before the work, so that a bad key shows at once
    if elf is not None:
        built = layout_image(elf, output, options)
    else:
        built = build_image(sources, output, options, bare=bare, defines=defines, includes=includes)
    written = [output] if elf else [output, output.with_suffix(".elf")]
    if loaded is not None:
        written.append(_write_signature(built.mrenclave, loaded, output, None, signing, debug_image=debug))
    if as_json:
        print_json(
            {
                "image": str(output),
                "files": [str(path) for path in written],
                "mrenclave": built.mrenclave.hex(),
                "size": built.layout.header.size,
                "pages": built.layout.pages,
            }
        )
        return
    for path in written:
        click.echo(f"wrote {path}")
    click.echo(f"MRENCLAVE {built.mrenclave.hex()}")


def _load_key(path: Path | None) -> Any:
    from ..image.key import load_key

    return None if path is None else load_key(path)


def _write_signature(
    mrenclave: bytes, key: Any, sgxs: Path, output: Path | None, signing: dict[str, Any], *, debug_image: bool
) -> Path:
    from ..image.sigstruct import sign_with_key

    signed = sign_with_key(_sig_params(signing, debug_image=debug_image).unsigned(mrenclave), key)
    target = output or sgxs.with_suffix(".sig")
    target.write_bytes(signed.to_bytes())
    return target


@image.command()
@click.argument("sgxs", type=_EXISTING, metavar="IMAGE.sgxs")
@click.option("--sig", type=_EXISTING, metavar="IMAGE.sig", help="Default: the one beside it, if any.")
@json_option
def info(sgxs: Path, sig: Path | None, as_json: bool) -> None:
    """Show what an image is made of, who signed it, and whether the signature fits."""
    from ..image.info import inspect
    from .image_info import describe, show

    found = inspect(sgxs)
    beside = sgxs.with_suffix(".sig")
    signature = sig or (beside if beside.is_file() else None)
    facts = describe(sgxs, found, signature)
    if as_json:
        print_json(facts)
    else:
        show(facts)


@image.command()
@click.argument("sgxs", type=_EXISTING, metavar="IMAGE.sgxs")
@json_option
def measure(sgxs: Path, as_json: bool) -> None:
    """Print MRENCLAVE of an image."""
    from ..image.info import measure_file

    mrenclave = measure_file(sgxs).hex()
    if as_json:
        print_json({"image": str(sgxs), "mrenclave": mrenclave})
    else:
        click.echo(mrenclave)


@image.command()
@click.argument("output", type=_PATH, metavar="KEY.pem")
@json_option
def key(output: Path, as_json: bool) -> None:
    """Make a signing key (RSA-3072, exponent 3) in a new file that only you can read."""
    from ..image.key import generate_key, save_key

    try:
        save_key(generate_key(), output)
    except FileExistsError:
        raise click.UsageError(f"{output} exists: a key is never overwritten, choose another name") from None
    if as_json:
        print_json({"key": str(output)})
    else:
        click.echo(f"wrote {output}")


@image.command()
@click.argument("sgxs", type=_EXISTING, metavar="IMAGE.sgxs")
@click.option(
    "--key", "key_path", type=_EXISTING, required=True, metavar="KEY.pem", help="RSA-3072 with exponent 3."
)
@click.option("-o", "--output", type=_PATH, metavar="IMAGE.sig", help="Default: beside the image.")
@signing_options
@json_option
def sign(sgxs: Path, key_path: Path, output: Path | None, as_json: bool, **signing: Any) -> None:
    """Sign an image: writes its SIGSTRUCT (1808 bytes)."""
    from ..image.info import inspect, read_sigstruct

    loaded = _load_key(key_path)
    found = inspect(sgxs)
    debug_image = found.header is not None and found.header.debug
    target = _write_signature(found.mrenclave, loaded, sgxs, output, signing, debug_image=debug_image)
    mrsigner = read_sigstruct(target).mrsigner.hex()
    if as_json:
        print_json(
            {
                "image": str(sgxs),
                "sigstruct": str(target),
                "mrenclave": found.mrenclave.hex(),
                "mrsigner": mrsigner,
            }
        )
        return
    click.echo(f"wrote {target}")
    click.echo(f"MRENCLAVE {found.mrenclave.hex()}")
    click.echo(f"MRSIGNER  {mrsigner}")


if TYPE_CHECKING:  # newer versions of click have it generic, older ones do not
    _BytesType = click.ParamType[bytes]
else:
    _BytesType = click.ParamType


class _Hash(_BytesType):
    """32 bytes in hexadecimal."""

    name = "sha256"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        if isinstance(value, bytes):
            return value
        try:
            data = bytes.fromhex(str(value))
        except ValueError:
            data = b""
        if len(data) != 32:
            self.fail(f"{value!r} is not 32 bytes in hexadecimal", param, ctx)
        return data


@image.command()
@click.argument("sgxs", type=_EXISTING, metavar="IMAGE.sgxs")
@click.argument("sig", type=_EXISTING, required=False, metavar="[IMAGE.sig]")
@click.option("--mrsigner", type=_Hash(), help="Who must have signed it.")
@click.option("--debug", is_flag=True, help="Would it do for a debug enclave?")
@json_option
def verify(sgxs: Path, sig: Path | None, mrsigner: bytes | None, debug: bool, as_json: bool) -> None:
    """Check a signature and that it belongs to the image; exit status 3 and a reason if not."""
    from ..image import sigstruct
    from ..image.info import measure_file, read_sigstruct

    mrenclave = measure_file(sgxs)
    target = sig or sgxs.with_suffix(".sig")
    signature = read_sigstruct(target)
    sigstruct.verify(
        signature,
        mrenclave=mrenclave,
        mrsigner=mrsigner,
        attributes=sigstruct.ATTR_MODE64BIT
        | (signature.attributes & sigstruct.ATTR_PROVISIONKEY)
        | (sigstruct.ATTR_DEBUG if debug else 0),
    )
    if as_json:
        print_json(
            {
                "image": str(sgxs),
                "sigstruct": str(target),
                "valid": True,
                "mrenclave": mrenclave.hex(),
                "mrsigner": signature.mrsigner.hex(),
            }
        )
    else:
        click.echo(f"{target} is a valid signature of {sgxs}")
        click.echo(f"MRSIGNER {signature.mrsigner.hex()}")
