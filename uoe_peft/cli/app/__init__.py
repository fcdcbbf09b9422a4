"""The page of `uoe-peft app`: one question, answered with forgetting off and on, and where its tokens went."""

from uoe_peft.cli.app.asking import Answer, ask, encode_question
from uoe_peft.cli.app.page import build_page, launch
from uoe_peft.cli.app.tokens import STYLE, routing_html

__all__ = ["STYLE", "Answer", "ask", "build_page", "encode_question", "launch", "routing_html"]
