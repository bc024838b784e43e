"""Serve rewards from several replicas of a model with Ray Serve (written against Ray 2.60).

    export ENDOREWARD_TOKEN=...
    serve run endoreward_fast.integrations.ray_serve:app model=Qwen/Qwen2.5-7B-Instruct \\
        num_replicas=4 ray_actor_options='{"num_gpus": 0.5}'

Paths and answers are those of `endoreward serve`. An application has two deployments. `Ingress` checks requests and
holds no model. Each replica of `Model` holds the model and forms batches from the requests that Ray sends to it. If a
replica dies, the ingress sends its requests to another one. That is safe, because a request changes nothing.
"""

import os

from ray.serve import Application

from ..errors import EndoRewardError
from ..serving.limits import TOKEN, token_in
from .ray_serve_arguments import sorted_arguments
from .ray_serve_deployments import build

HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"


def app(args: dict) -> Application:
    """Return the application, for `serve run`, `serve.run` and config files of Ray Serve.

    args    {name: value}. `serve run` takes them as name=value, where a list or an object is written as JSON:
      model               a folder, a Hub name or a GGUF file; "pocket" is built in
      dtype, device, revision, subfolder, gguf_file, trust_remote_code
                          as in EndoRewardModel.from_pretrained
      alpha, reduction, system, max_length, max_tokens_per_batch, ...
                          as in EndoRewardModel.score. A request may set others, but not max_tokens_per_batch
      served_name, window_ms, max_waiting, max_rows, max_request_tokens, max_request_mb, timeout
                          as the flags of `endoreward serve`. Each replica has a queue of max_waiting rows
      token_file          file with the token. This function reads it, so other nodes do not need it. Default: the
                          environment variable ENDOREWARD_TOKEN
      local               true: serve without a token. Requests from other machines get status 403
      ingress_replicas    processes that check requests (default 1)
      num_replicas, autoscaling_config, ray_actor_options, max_ongoing_requests, max_queued_requests, ...
                          Ray's options of a deployment, for the replicas of the model. A replica has a GPU only if
                          ray_actor_options has num_gpus

    Raises EndoRewardError: an unknown argument, a value that cannot work, no token.
    """
    settings, of_ray = sorted_arguments(args)
    token = token_in(settings.token_file, needed=False, flag="token_file")
    if token is None and not settings.local:
        raise EndoRewardError(
            f"no token: set {TOKEN}, or name a file with token_file=FILE; local=true serves this machine only"
        )
    if token is None and os.environ.get(HAPROXY, "0") != "0":
        raise EndoRewardError(f"local=true cannot work with {HAPROXY}, which hides where requests come from")
    return build(settings, token, of_ray)
