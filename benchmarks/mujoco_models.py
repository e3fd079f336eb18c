"""One small MuJoCo model per feature of the derivative, and models that must be refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mujoco

from benchmarks.mujoco_tasks import anything, constraint, contact, touching

MESH = (
    '<mesh name="stone" vertex="1 0 0 0 1.1 .1 0 0 .9 -1 .1 0 .1 -1.2 0 0 .1 -1.1 .6 .7 .5 -.6 -.6 .4" '
    'scale=".15 .15 .15"/>'
)
SHAPES = {
    "sphere": 'type="sphere" size=".11"',
    "capsule": 'type="capsule" size=".07 .15"',
    "box": 'type="box" size=".1 .13 .16"',
    "ellipsoid": 'type="ellipsoid" size=".1 .14 .18"',
    "cylinder": 'type="cylinder" size=".1 .15"',
    "mesh": 'type="mesh" mesh="stone"',
}
SOFT = 'solimp=".8 .95 .02 .5 2" solref=".021 .9"'
"""a ramp as wide as the depths that occur, so that its slope matters"""
SLIDING, TUMBLING = {"kick": 1.5}, {"kick": 1.0}


@dataclass(frozen=True)
class Feature:
    """A model, how to draw its states, and what is known to limit it."""

    xml: str
    draw: dict[str, Any] = field(default_factory=dict)
    keep: Callable[[mujoco.MjData], bool] = contact
    second: bool = True
    """whether the step must have second derivatives; otherwise it may refuse them"""
    noisy: str = ""
    """why the reference itself is limited, if it is"""


def scene(bodies: str, *, option: str = "", floor: str = 'friction=".1 .001 .001"', extra: str = "") -> str:
    ground = f'<geom name="floor" type="plane" size="5 5 .1" {floor}/>' if floor else ""
    return (
        f'<mujoco><option timestep=".002" {option}/><asset>{MESH}</asset>'
        f"<worldbody>{ground}{bodies}</worldbody>{extra}</mujoco>"
    )


def free(shape: str, extra: str = SOFT, height: float = 0.12) -> str:
    """A tumbling body whose geom is off its origin."""
    geom = f'<geom name="{shape}" pos=".01 .02 .015" {SHAPES[shape]} friction=".7 .02 .01" {extra}/>'
    return f'<body name="{shape}" pos="0 0 {height}"><freejoint/>{geom}</body>'


def pair(first: str, second: str) -> str:
    """Two bodies without weight that start inside one another."""
    body = lambda name, shape, at, friction: (
        f'<body name="{name}"><freejoint/><geom name="{name}" pos="{at}" {SHAPES[shape]} friction="{friction} .01 .01" '
        f"{SOFT}/></body>"
    )
    bodies = body("a", first, ".01 0 .02", 0.6) + body("b", second, "0 .01 .02", 0.5)
    return scene(bodies, option='gravity="0 0 0"', floor="")


def arm(*, ball: str = 'stiffness="2"', hinge: str = "", first: str = "", slide: str = "", geom: str = "") -> str:
    """Ball, two hinges and a slide."""
    limb = f'size=".03" {geom}'
    return f"""<body name="upper" pos="0 0 .6" {first}>
    <joint name="shoulder" type="ball" damping=".1" {ball}/>
    <geom type="capsule" fromto="0 0 0 .3 0 0" friction=".9 .02 .02" {limb}/>
    <body name="lower" pos=".3 0 0"><joint name="elbow" axis="0 1 0" damping=".05" armature=".01" {hinge}/>
      <geom type="capsule" fromto="0 0 0 .3 0 0" {limb}/>
      <body name="hand" pos=".3 0 0"><joint name="wrist" axis="0 0 1" damping=".05" pos=".02 0 0"/>
        <joint name="slide" type="slide" axis="1 0 .3" stiffness="30" damping=".3" range="-.03 .03" limited="true"
          {slide}/>
        <geom name="tip" type="capsule" fromto="0 0 0 .2 .1 0" friction=".8 .01 .01" {limb}/><site name="tip"/>
      </body></body></body>"""


NO_CONTACT = 'contype="0" conaffinity="0"'
ACTUATORS = """<actuator><position joint="elbow" kp="20" kv="1.5"/><velocity joint="wrist" kv=".7"/>
<general joint="slide" gaintype="affine" gainprm="3 1 .2" biastype="affine" biasprm=".1 -2 -.3" dyntype="filter"
  dynprm=".05"/><motor joint="shoulder" gear="1 .3 -.5"/></actuator>"""
ACTIVATIONS = """<actuator><position joint="elbow" kp="5" timeconst=".02"/>
<general joint="elbow" dyntype="integrator" gainprm="2" biastype="affine" biasprm="0 -2 0" actearly="true"/>
<general joint="wrist" dyntype="filterexact" dynprm=".03" gainprm="2" biastype="affine" biasprm="0 -2 0"/>
<general joint="wrist" dyntype="filter" dynprm=".04" gainprm="1" actlimited="true" actrange="-1 1"
  forcelimited="true" forcerange="-20 20"/></actuator>"""
TENDON = """<tendon><fixed name="cord" stiffness="4" damping=".3" springlength=".1" frictionloss=".2" {}>
<joint joint="elbow" coef=".7"/><joint joint="wrist" coef="-.4"/><joint joint="slide" coef="2"/></fixed></tendon>
<actuator><position tendon="cord" kp="5" kv=".2"/></actuator>"""
EQUALITIES = """<equality><connect body1="hand" body2="x" anchor=".1 0 0" solref=".023 1"/>
<weld body1="y" body2="lower" torquescale=".7" solref=".03 1.2"/>
<joint joint1="elbow" joint2="wrist" polycoef="0.1 .5 .3 0 0"/></equality>"""
LOOSE = "".join(
    f'<body name="{name}" pos="{at}"><freejoint/><geom type="box" size=".03 .04 .05" {NO_CONTACT}/></body>'
    for name, at in (("x", ".9 .1 .6"), ("y", ".5 .2 .6"))
)
PENDULUM = """<body name="upper" pos="0 0 1"><joint name="hinge" axis="0 1 0" damping=".1"/>
<geom name="rod" type="capsule" fromto="0 0 0 0 0 -.4" size=".04" {}/><site name="middle" pos=".05 0 -.2"/>
<body name="lower" pos="0 0 -.4"><joint name="knee" axis="0 1 0" damping=".1"/>
<geom type="capsule" fromto="0 0 0 0 0 -.4" size=".03" {}/><site name="end" pos="0.02 0 -.4"/></body></body>"""
HANGING = PENDULUM.format(NO_CONTACT, NO_CONTACT)
PAIRS = {
    # pair: whether it has second derivatives, and what limits the reference
    "sphere-sphere": (True, ""),
    "sphere-capsule": (True, ""),
    "capsule-capsule": (True, ""),
    "sphere-box": (True, ""),
    "sphere-mesh": (True, ""),
    "capsule-box": (True, ""),
    "box-box": (True, ""),
    "mesh-box": (True, ""),
    "mesh-mesh": (True, ""),
    "sphere-cylinder": (True, ""),
    "ellipsoid-sphere": (False, "the collider's normals carry noise of 1e-8 to 2e-5"),
    "capsule-cylinder": (False, "the collider's normals carry noise of 1e-8 to 2e-5"),
}
LONG = {"steps": (75, 300), "kick": 0.5}


def features() -> dict[str, Feature]:
    """Name of the row -> feature; the order of the recipe's tables."""
    rows: dict[str, Feature] = {}
    for shape in SHAPES:
        rows[f"plane-{shape}"] = Feature(scene(free(shape)), TUMBLING)
    for name, (second, noisy) in PAIRS.items():
        first, other = name.split("-")
        rows[name] = Feature(
            pair(first, other), {"steps": (0, 1), "kick": 0.3, "tumbled": 0.12}, touching, second=second, noisy=noisy
        )
    for condim in (1, 4, 6):
        floor = 'friction=".1 .001 .001"' + (' condim="1"' if condim == 1 else "")
        rows[f"pyramid-condim-{condim}"] = Feature(
            scene(free("box", SOFT + f' condim="{condim}"'), floor=floor), SLIDING
        )
    for condim in (3, 4, 6):
        cone = 'cone="elliptic" impratio="3"'
        for shape in ("sphere", "box"):
            xml = scene(free(shape, SOFT + f' condim="{condim}"'), option=cone)
            rows[f"elliptic-{shape}-condim-{condim}"] = Feature(xml, SLIDING)
    return rows | laws() | joints() | integrators() | differenced()


def laws() -> dict[str, Feature]:
    """Parameters of contacts."""
    ramp = 'solimp=".8 .95 .02 .5 2"'
    direct = scene(
        free("box", ramp + ' solref="-800 -30" solmix="3"'), floor='friction=".1 .001 .001" solref="-500 -10"'
    )
    priority = scene(free("capsule", ramp + ' priority="1"'), floor='friction="1 .001 .001"')
    margin = scene(free("box", 'solimp=".3 .95 .02 .3 3" margin=".004" gap=".002"'), floor='condim="3"')
    explicit = scene(
        free("sphere"),
        extra=f'<contact><pair geom1="floor" geom2="sphere" friction=".5 .4 .02 .01 .01" condim="4" {SOFT}/></contact>',
    )
    field = '<hfield name="hills" nrow="3" ncol="3" elevation="0 0 0 .1 .1 .1 .2 .2 .2" size="1 1 .1 .1"/>'
    hills = scene(free("sphere"), floor="").replace("<worldbody>", '<worldbody><geom type="hfield" hfield="hills"/>')
    mocap = scene(
        free("box") + '<body name="hand" mocap="true" pos=".05 .02 .2"><geom type="sphere" size=".1"/></body>',
    )
    return {
        "direct-solref-solmix": Feature(direct, TUMBLING),
        "priority": Feature(priority, TUMBLING),
        "margin-gap-power": Feature(margin, TUMBLING),
        "explicit-pair": Feature(explicit, SLIDING),
        "height-field": Feature(hills.replace("<asset>", f"<asset>{field}"), TUMBLING, second=False),
        "mocap": Feature(mocap, TUMBLING),
        "self-contact": Feature(scene(arm(ball="", hinge='range="-1 1"')), LONG | {"spread": 0.5}),
    }


def joints() -> dict[str, Feature]:
    """Joints, limits, friction, actuators, tendons, equalities."""
    limits = arm(
        ball='range="0 .4" limited="true"', hinge='range="-.2 .2" limited="true"', slide='margin=".01"', geom=NO_CONTACT
    )
    return {
        "free-ball-hinge-slide": Feature(scene(arm(geom=NO_CONTACT)), LONG, anything),
        "limits": Feature(scene(limits), LONG | {"steps": (75, 300)}, constraint),
        "frictionloss": Feature(scene(arm(ball="", hinge='frictionloss=".6"', geom=NO_CONTACT)), LONG, constraint),
        "gravcomp": Feature(scene(arm(first='gravcomp=".5"', geom=NO_CONTACT)), LONG, anything),
        "actuators": Feature(scene(arm(ball="", geom=NO_CONTACT), extra=ACTUATORS), LONG, anything),
        "activations": Feature(scene(arm(geom=NO_CONTACT), extra=ACTIVATIONS), LONG, anything),
        "tendon": Feature(scene(arm(geom=NO_CONTACT), extra=TENDON.format("")), LONG, anything),
        "tendon-limit": Feature(
            scene(arm(geom=NO_CONTACT), extra=TENDON.format('range="-.05 .05" limited="true" armature=".02"')),
            LONG | {"spread": 0.3},
            constraint,
        ),
        "connect-weld-joint": Feature(
            scene(arm(ball="", geom=NO_CONTACT) + LOOSE, extra=EQUALITIES),
            LONG | {"spread": 0.02, "kick": 0.3},
            constraint,
        ),
    }


def integrators() -> dict[str, Feature]:
    """Every integrator on an arm with actuators and on a box that lands."""
    rows = {}
    for name in ("Euler", "implicitfast", "implicit", "RK4"):
        option = f'integrator="{name}"'
        rows[f"{name.lower()}-arm"] = Feature(
            scene(arm(hinge='frictionloss=".05"', geom=NO_CONTACT), option=option, extra=ACTIVATIONS), LONG, anything
        )
        rows[f"{name.lower()}-box"] = Feature(scene(free("box"), option=option + ' cone="elliptic"'), SLIDING)
    option = 'integrator="Euler"><flag eulerdamp="disable"/></option><option timestep=".002"'
    rows["euler-explicit-damping"] = Feature(scene(arm(geom=NO_CONTACT), option=option), LONG, anything)
    return rows


def differenced() -> dict[str, Feature]:
    """Forces outside the program, which are differenced alone."""
    spatial = '<tendon><spatial stiffness="20" damping=".5"><site site="hook"/><site site="end"/></spatial></tendon>'
    hook = '<site name="hook" pos=".3 0 .5"/>'
    muscle = '<actuator><muscle joint="hinge" force="30" lengthrange="-2 2"/></actuator>'
    site = '<actuator><motor site="end" gear="1 0 .5 0 .2 0"/></actuator>'
    return {
        "fluid": Feature(scene(HANGING, option='density="500" viscosity=".1"'), LONG, anything, second=False),
        "spatial-tendon": Feature(scene(HANGING + hook, extra=spatial), LONG, anything, second=False),
        "muscle": Feature(scene(HANGING, extra=muscle), LONG, anything, second=False),
        "site-transmission": Feature(scene(HANGING, extra=site), LONG, anything, second=False),
    }


def refused() -> dict[str, str]:
    """Models whose construction must raise `MujocoUnsupportedError`."""
    flat = '<body pos="0 0 .1"><freejoint/><geom type="cylinder" size=".1 .1"/></body>'
    grid = (
        '<mujoco><worldbody><flexcomp type="grid" count="3 3 1" spacing=".1 .1 .1" name="cloth" radius=".01" dim="2"/>'
        "</worldbody></mujoco>"
    )
    return {
        "flex": grid,
        "cylinder-cylinder": scene(flat + flat.replace(".1 .1", ".2 .1"), floor=""),
        "cylinder-box": scene(flat + free("box"), floor=""),
        "noslip": scene(free("box"), option='noslip_iterations="5"'),
        "user-dynamics": scene(
            HANGING, extra='<actuator><general joint="hinge" dyntype="user" actdim="1"/></actuator>'
        ),
        "limited-spatial-tendon": scene(
            HANGING + '<site name="hook" pos=".3 0 .5"/>',
            extra='<tendon><spatial limited="true" range="0 .3"><site site="hook"/><site site="end"/></spatial>'
            "</tendon>",
        ),
        "engine-delay": scene(HANGING, extra='<actuator><motor joint="hinge" delay=".01" nsample="5"/></actuator>'),
    }
