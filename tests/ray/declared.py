"""What a `serveConfigV2` of the tests names: a backbone's application, built from what `args` say."""

from __future__ import annotations

from pathlib import Path

from ray import serve

from polygraft.cluster.model import Backbone
from polygraft.cluster.settings import ServeSettings, Settings
from polygraft.serving.app import engine_app


def build(args: dict[str, str]) -> serve.Application:
    home = Path(args["home"])
    settings = Settings(
        home=home,
        data=home,
        store_url=args["store_url"],
        serve=ServeSettings.model_validate_json(args["serve"]),
        step_floor_s=float(args["step_floor_s"]),
    )
    backbone = Backbone(
        name=args["backbone"],
        folder=args["folder"],
        dtype="fp32",
        quantise=None,
        fingerprint="",
        context_length=512,
        added_at=0.0,
        asked_at=1.0,
    )
    return engine_app(settings, backbone)
