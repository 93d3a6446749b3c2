"""What the arguments of `maxstack serve` mean for the start and for the front."""

import argparse
from pathlib import Path
from typing import Any

from maxstack.config import UserError
from maxstack.serve.http.settings import Settings
from maxstack.serve.operate.keys import keys_in
from maxstack.serve.operate.listen import checked_tls, is_loopback
from maxstack.serve.starting import DRAFTS, Start


def start_of(args: argparse.Namespace) -> Start:
    """What is to be served."""
    return Start(
        model=args.model, name=args.name, adapters=tuple(args.adapters), weights=args.weights, dtype=args.dtype,
        step=args.step, averaged=args.averaged, kv=args.kv, max_length=args.max_length, rows=args.rows,
        pages=args.pages, waiting=args.waiting, adapter_slots=args.adapter_slots, adapter_rank=args.adapter_rank,
        drafts=args.drafts or (DRAFTS if args.draft_model else 0), draft_model=args.draft_model,
        tensor=args.tensor, invariant=args.invariant,
    )  # fmt: skip


def settings_of(args: argparse.Namespace) -> Settings:
    """What the front is told."""
    keys = () if args.api_key_file is None else keys_in(args.api_key_file, "--api-key-file")
    management_key = None
    if args.management_key_file is not None:
        [management_key, *more] = keys_in(args.management_key_file, "--management-key-file")
        if more or management_key in keys:
            raise UserError(
                f"--management-key-file {args.management_key_file}: give one key there, and none of --api-key-file's"
            )
    fields: dict[str, Any] = {} if args.deadline is None else {"deadline_s": args.deadline}
    return Settings(
        model_name=start_of(args).model_name, api_keys=keys, management_key=management_key,
        cors_origins=tuple(args.cors_origin), tls=checked_tls(args.tls_cert, args.tls_key),
        local_names_only=not keys and not args.allow_no_key and is_loopback(args.host),
        chat_template=template_of(args.template), parser=args.parser, log_prompts=args.log_prompts, **fields,
    )  # fmt: skip


def template_of(name: str | None) -> str | None:
    """A template's text, or its name."""
    from maxstack.chat.command import CHATML, template_in

    return name if name in (None, CHATML) else template_in(Path(name).expanduser())
