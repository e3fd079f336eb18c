"""Hostile and broken MuJoCo XML: refused by name, without a hang or crash, and nothing outside is read."""

import os
import struct
import time
import zlib
from pathlib import Path

import mujoco
import numpy as np
import pytest

from sim2real.simulators import mujoco_xml
from sim2real.simulators.mujoco_xml import XmlLimits, XmlRefusedError, load_spec, load_xml, read_xml

BALL = "<body><freejoint/><geom size='0.1'/></body>"
OBJ = b"v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nf 1 3 2\nf 1 2 4\nf 1 4 3\nf 2 3 4\n"


def world(inside: str = BALL, before: str = "") -> str:
    return f"<mujoco>\n{before}\n<worldbody>\n{inside}\n</worldbody></mujoco>"


def asset(element: str, compiler: str = "") -> str:
    return world(before=f"<compiler {compiler}/><asset>{element}</asset>")


def nested(depth: int) -> str:
    return world("<body>" * depth + "</body>" * depth)


def huge_png() -> bytes:
    """A few bytes that promise 60000 x 60000 pixels."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data)) for tag, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


BOMB = "".join(f"<!ENTITY l{k + 1} '{f'&l{k};' * 10}'>" for k in range(9))
HOSTILE = {
    # files outside the folder
    "include_absolute": (world("<include file='{outside}/secret.xml'/>"), r"line 4: .*is an absolute path"),
    "include_above": (
        world("<include file='../outside/secret.xml'/>"),
        r"line 4: '../outside/secret.xml' lies outside",
    ),
    "include_link": (world("<include file='link.xml'/>"), r"line 4: 'link.xml' lies outside"),
    "include_linked_folder": (world("<include file='linked/secret.xml'/>"), r"'linked/secret.xml' lies outside"),
    "include_of_an_include": (world("<include file='goes_out.xml'/>"), r"'goes_out.xml', line 1: .*lies outside"),
    "include_url": (world("<include file='http://127.0.0.1/a.xml'/>"), r"is not a path in the folder"),
    "include_file_url": (world("<include file='file:///etc/passwd'/>"), r"is not a path in the folder"),
    "include_without_file": (world("<include/>"), r"line 4: names no file"),
    "include_missing": (world("<include file='none.xml'/>"), r"'none.xml' cannot be read: No such file"),
    "include_device": (world("<include file='pipe'/>"), r"'pipe' is not a regular file"),
    "mesh_above": (asset("<mesh name='m' file='../outside/m.obj'/>"), r"line 2: '../outside/m.obj' lies outside"),
    "meshdir_above": (asset("<mesh file='m.obj'/>", "meshdir='../outside'"), r"'../outside/m.obj' lies outside"),
    "meshdir_absolute": (asset("<mesh file='m.obj'/>", "meshdir='/etc'"), r"line 2: meshdir='/etc'"),
    "assetdir_absolute": (asset("<hfield name='h' file='h.png'/>", "assetdir='/etc'"), r"assetdir='/etc'"),
    "assetdir_link": (asset("<mesh file='secret.xml'/>", "assetdir='linked'"), r"lies outside"),
    "hfield_absolute": (asset("<hfield name='h' file='/etc/passwd' size='1 1 1 1'/>"), r"absolute path"),
    "texture_link": (asset("<texture name='t' type='2d' file='link.xml'/>"), r"'link.xml' lies outside"),
    "texture_face": (asset("<texture name='t' type='cube' fileright='../outside/t.png'/>"), r"lies outside"),
    "skin_above": (asset("<skin name='s' file='../outside/s.skn'/>"), r"lies outside"),
    "flexcomp_absolute": (world("<flexcomp name='f' type='gmsh' file='/etc/passwd'/>"), r"absolute path"),
    "backslashes": (asset(r"<mesh file='..\outside\m.obj'/>"), r"is not a path in the folder"),
    # recursion, entities, native code
    "include_itself": (world("<include file='loop.xml'/>"), r"'loop.xml' includes itself"),
    "include_ring": (world("<include file='ring_a.xml'/>"), r"'ring_a.xml' includes itself"),
    "include_twice": (world("<include file='ball.xml'/><include file='ball.xml'/>"), r"included twice"),
    "entity_bomb": (f"<!DOCTYPE m [<!ENTITY l0 'lol'>{BOMB}]>" + world("<geom name='&l9;'/>"), r"DOCTYPE or entity"),
    "external_entity": ("<!DOCTYPE m [<!ENTITY x SYSTEM '/etc/passwd'>]>" + world("&x;"), r"DOCTYPE or entity"),
    "extension": (
        world(before="<extension><plugin plugin='mujoco.pid'/></extension>"),
        r"line 2: <extension>: plugins",
    ),
    "plugin_sensor": (
        world(before="<sensor><plugin plugin='mujoco.sensor.touch_grid'/></sensor>"),
        r"<plugin>: plugins",
    ),
    "plugin_attribute": (world("<body plugin='x'/>"), r"<body plugin>: plugins run native code"),
    "model_asset": (asset("<model name='m' file='ball.xml'/>"), r"<model>: another model"),
    "attach": (world("<attach model='m' body='b' prefix='p'/>"), r"<attach>: another model"),
    # numbers
    "nan": (world("<body>\n<geom size='nan'/></body>"), r"line 5: <geom size> holds nan"),
    "minus_inf": (world("<body pos='0 -inf 0'/>"), r"<body pos> holds inf"),
    "nan_payload": (world("<body pos='0 nan(0x1) 0'/>"), r"holds nan"),
    "nan_in_default": (world(before="<default><joint damping='NAN'/></default>"), r"line 2: <joint damping> holds NAN"),
    "infinite_timestep": (world(before="<option timestep='infinity'/>"), r"holds infinity"),
    "too_large": (world("<geom size='1e999'/>"), r"number is too large .*line 4"),
    "overflow": (world("<body><freejoint/><geom size='1e200'/></body>"), r"not finite|does not compile"),
    "negative_mass": (world("<body><freejoint/><geom size='1' mass='-1'/></body>"), r"does not compile"),
    "inertia": (
        world("<body><freejoint/><inertial pos='0 0 0' mass='1' diaginertia='1 1 9'/></body>"),
        r"does not compile",
    ),
    # absurd sizes
    "replicate": (
        world("<replicate count='1000000000'>" + BALL + "</replicate>"),
        r"<replicate count> asks for 1e\+09",
    ),
    "replicates_nested": (
        world("<replicate count='200'>" * 3 + "<geom size='1'/>" + "</replicate>" * 3),
        r"4e\+04 copies",
    ),
    "composite": (world("<body><composite type='cable' count='99999 99999 1'/></body>"), r"<composite count>"),
    "flexcomp": (world("<flexcomp name='f' count='9999 9999 9999'/>"), r"<flexcomp count>"),
    "hfield": (asset("<hfield name='h' nrow='100000' ncol='100000' size='1 1 1 1'/>"), r"<hfield nrow>"),
    "texture": (asset("<texture name='t' type='2d' builtin='flat' width='99999' height='9'/>"), r"<texture width>"),
    "memory": (world(before="<size memory='3T'/>"), r"line 2: <size memory> asks for 3T"),
    "nconmax": (world(before="<size njmax='2000000000'/>"), r"<size njmax> asks for 2e\+09"),
    "nstack": (world(before="<size nstack='99999999999'/>"), r"<size nstack>"),
    "nuser": (world(before="<size nuser_geom='2000000000'/>"), r"<size nuser_geom>"),
    "deep": (nested(5000), r"nested deeper than 100"),
    "png_bomb": (asset("<texture name='t' type='2d' file='huge.png'/>"), r"does not compile|memory|ends the compiler"),
    "stl_bomb": (asset("<mesh name='m' file='huge.stl'/>"), r"does not compile|memory|ends the compiler"),
    # broken
    "empty": ("", r"not well-formed XML in UTF-8 \(no element found\)"),
    "text": ("robot", r"cannot be read|not well-formed|No such file"),
    "truncated": (world()[:-30], r"line 4: is not well-formed"),
    "two_roots": (world() + "<mujoco/>", r"line 5: is not well-formed XML .*junk"),
    "nul": ("<mujoco>\0</mujoco>", r"is not well-formed XML"),
    "other_format": ("<robot name='r'><link name='l'/></robot>", r"the root is <robot>"),
    "unknown_attribute": (world("<geom size='1' colour='red'/>"), r"unrecognized attribute: 'colour'.*line 4"),
    "unknown_joint": (world(before="<actuator><motor joint='hipp'/></actuator>"), r"hipp"),
    "broken_mesh": (asset("<mesh name='m' file='ball.xml'/>"), r"does not compile"),
    "keyframe": (world(before="<keyframe><key qpos='1 2 3 4 5 6 7 8 9'/></keyframe>"), r"does not compile.*qpos"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files that XML may name, beside one that it may not."""
    above = tmp_path_factory.mktemp("above")
    home, outside = above / "home", above / "outside"
    home.mkdir()
    outside.mkdir()
    (outside / "secret.xml").write_text("<mujocoinclude><geom name='secret' size='1'/></mujocoinclude>")
    (outside / "m.obj").write_bytes(OBJ)
    (home / "link.xml").symlink_to(outside / "secret.xml")
    (home / "linked").symlink_to(outside)
    (home / "goes_out.xml").write_text("<mujocoinclude><include file='../outside/secret.xml'/></mujocoinclude>")
    (home / "loop.xml").write_text("<mujocoinclude><include file='loop.xml'/></mujocoinclude>")
    (home / "ring_a.xml").write_text("<mujocoinclude><include file='ring_b.xml'/></mujocoinclude>")
    (home / "ring_b.xml").write_text("<mujocoinclude><include file='ring_a.xml'/></mujocoinclude>")
    (home / "ball.xml").write_text(f"<mujocoinclude>{BALL}</mujocoinclude>")
    (home / "huge.png").write_bytes(huge_png())
    (home / "huge.stl").write_bytes(bytes(80) + struct.pack("<I", 2**32 - 1) + bytes(100))
    (home / "meshes").mkdir()
    (home / "meshes" / "m.obj").write_bytes(OBJ)
    os.mkfifo(home / "pipe")
    return home


@pytest.mark.parametrize("case", sorted(HOSTILE))
def test_hostile_or_broken_xml_is_refused_by_name(folder: Path, case: str) -> None:
    xml, message = HOSTILE[case]
    path = folder / f"{case}_.xml"
    path.write_text(xml.replace("{outside}", str(folder.parent / "outside")))
    start = time.monotonic()
    with pytest.raises(XmlRefusedError, match=message) as caught:
        load_xml(path, limits=XmlLimits(seconds=4.0, memory=2**29))
    assert time.monotonic() - start < 15.0  # with the start of the child on a busy machine
    assert any(f"'{name}'" in str(caught.value) for name in (path.name, "goes_out.xml", "loop.xml", "ring_b.xml"))


def test_a_model_that_takes_too_long_or_too_much_is_given_up() -> None:
    slow = world("<replicate count='9000' offset='1 0 0'>" + BALL + "</replicate>")
    with pytest.raises(XmlRefusedError, match=r"not compiled within 0\.5 s"):
        load_xml(slow, limits=XmlLimits(seconds=0.5))
    large = asset("<texture name='t' type='2d' builtin='flat' width='16000' height='16000'/>")
    with pytest.raises(XmlRefusedError, match=r"memory"):
        load_xml(large, limits=XmlLimits(memory=2**28))
    with pytest.raises(XmlRefusedError, match=r"ran out of memory|the arena takes"):
        load_xml(world(before="<size nstack='50000000'/>"), limits=XmlLimits(memory=2**28))
    assert load_xml(world()).nv == 6  # the server is well


def test_nothing_outside_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even by a name that the scan does not know: the child can open no file, and the parent asks it first."""
    monkeypatch.setattr(mujoco_xml, "FILES", ())
    outside = folder.parent / "outside" / "m.obj"
    inside = "<body><freejoint/><geom type='mesh' mesh='m'/></body>"
    xml = f"<mujoco><asset><mesh name='m' file='{outside}'/></asset><worldbody>{inside}</worldbody></mujoco>"
    assert mujoco.MjModel.from_xml_string(xml).nmeshvert == 4  # MuJoCo alone would read it
    with pytest.raises(XmlRefusedError, match="does not compile"):
        load_xml(xml)


def test_files_that_are_not_models(tmp_path: Path) -> None:
    with pytest.raises(XmlRefusedError, match="not a regular file"):
        load_xml("/dev/zero")
    with pytest.raises(XmlRefusedError, match="not a regular file"):
        load_xml(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_xml(tmp_path / "none.xml")
    sparse = tmp_path / "large.xml"
    with sparse.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(XmlRefusedError, match="has 1099511627776 bytes"):
        load_xml(sparse)
    for name, content in (("utf16.xml", world().encode("utf-16")), ("latin.xml", b"<mujoco model='\xe9'/>")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(XmlRefusedError, match="is not well-formed XML in UTF-8"):
            load_xml(tmp_path / name)


def test_limits_are_arguments(folder: Path) -> None:
    with pytest.raises(XmlRefusedError, match="more than 3 elements"):
        load_xml(world(), limits=XmlLimits(elements=3))
    with pytest.raises(XmlRefusedError, match="more than 0 includes"):
        read_xml(world("<include file='ball.xml'/>"), folder=folder, limits=XmlLimits(includes=0))
    with pytest.raises(XmlRefusedError, match="and its files take"):
        read_xml(asset("<mesh file='meshes/m.obj'/>"), folder=folder, limits=XmlLimits(all_bytes=200))
    with pytest.raises(XmlRefusedError, match="XML given as text has no files"):
        read_xml(asset("<mesh file='meshes/m.obj'/>"))


@pytest.mark.parametrize("compiler", ["", "meshdir='meshes'", "assetdir='meshes'", "meshdir='meshes/../meshes'"])
def test_files_of_the_folder_are_read(folder: Path, compiler: str) -> None:
    name = "m.obj" if compiler else "meshes/m.obj"
    inside = "<body><freejoint/><geom type='mesh' mesh='m'/></body><include file='ball.xml'/>"
    assets = f"<compiler {compiler}/><asset><mesh name='m' file='{name}'/></asset>"
    xml = f"<mujoco>{assets}<worldbody>{inside}</worldbody></mujoco>"
    (folder / "good.xml").write_text(xml)
    model = load_xml(folder / "good.xml")
    assert (model.nv, model.nmeshvert) == (12, 4)
    assert np.isfinite(model.body_inertia).all()
    spec = load_spec(folder / "good.xml")
    spec.bodies[1].name = "renamed"
    assert spec.compile().body("renamed").id == 1


def test_a_wider_folder_may_be_named(folder: Path) -> None:
    xml = asset("<mesh name='m' file='m.obj'/>", "meshdir='../outside'")
    (folder / "wide.xml").write_text(xml)
    assert load_xml(folder / "wide.xml", folder=folder.parent).nmesh == 1


def test_a_compiler_that_was_killed_is_started_again() -> None:
    load_xml(world())
    server = mujoco_xml._compiler(os.getpid())
    server.kill()
    server.wait()
    with pytest.raises(XmlRefusedError, match="not compiled"):
        load_xml(world())
    assert load_xml(world()).nv == 6
