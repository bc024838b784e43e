"""The bodies of requests: which fields they have, with examples. FastAPI shows them at /docs."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ..text.messages import check_text


def _checked(text: str) -> str:
    check_text(text, "the text")
    return text


Text = Annotated[str, AfterValidator(_checked)]
Message = dict[str, Any]
ROWS: Any = [
    {"prompt": "What is 2 + 3?", "completions": ["5", "6"]},
    {"prompt_ids": [1, 2, 3], "completion_ids": [4, 5], "terminal": True},
]


class Rewards(BaseModel):
    """Rows to score. Further fields are options of `EndoRewardModel.score`, such as alpha, reduction or system."""

    model_config = ConfigDict(
        strict=True, extra="allow", json_schema_extra={"example": {"rows": ROWS, "per_token": True}}
    )

    rows: list[Any] = Field(min_length=1, description="rows as `endoreward score` takes them")
    model: str | None = Field(None, description="checked against the served model's name")


class GetReward(BaseModel):
    """OpenRLHF's remote reward model (`--reward.remote_url`)."""

    model_config = ConfigDict(
        strict=True,
        json_schema_extra={"example": {"query": ["What is 2 + 3? 5"], "prompts": ["What is 2 + 3?"], "labels": ["5"]}},
    )

    query: list[Text] = Field(min_length=1, description="prompt and response as one text, special tokens included")
    prompts: list[Text] = Field(description="the prompt of each query")
    labels: list[Any] | None = Field(None, description="not used")


class RemoteRM(BaseModel):
    """slime's remote reward model (`--rm-type remote_rm`)."""

    model_config = ConfigDict(
        strict=True, json_schema_extra={"example": {"prompt": "What is 2 + 3?", "response": " 5", "label": "5"}}
    )

    prompt: Text | list[Message] = Field(description="text with the template applied, or messages")
    response: Text = Field(description="the sampled text, its end token included")
    label: Any = Field(None, description="not used")


class Pooled(BaseModel):
    """What vLLM's pooling paths have in common. Fields that do not change the reward are accepted and not used."""

    model_config = ConfigDict(
        strict=True,
        json_schema_extra={
            "example": {
                "messages": [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "5"}],
                "use_activation": False,
            }
        },
    )

    model: str | None = Field(None, description="checked against the served model's name")
    input: Text | list[Text] | list[int] | list[list[int]] | None = Field(
        None, description="whole conversations, as the chat template writes them, or their token ids"
    )
    messages: list[Message] | None = Field(None, description="one conversation, in place of input")
    add_special_tokens: bool = Field(True, description="begin the input with the token that the tokenizer begins with")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="variables of the model's template")
    use_activation: Literal[False] | None = Field(None, description="the reward is not a probability: false")
    encoding_format: Literal["float"] = Field("float", description="float")
    chat_template: None = Field(None, description="refused: templates of requests are not used")
    truncate_prompt_tokens: None = Field(None, description="refused: it would change the reward")


class Pooling(Pooled):
    """vLLM's /pooling: the reward of each token, or one number."""

    task: Literal["token_classify", "classify"] | None = Field(
        None, description="classify gives one number; the default gives one for each token of the input"
    )
