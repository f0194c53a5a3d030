"""What `openapi.json`, and `help()` of the clients, say about fields of requests and answers."""

from collections.abc import Mapping
from typing import Final

_NO_EFFECT: Final = "Accepted for compatibility; has no effect on the answer."
_MODEL: Final = "Name of the model, as /v1/models lists it."
_RECOMMENDED: Final = "Default: default_sampling_params of /v1/models, if the model has them"
_LOGPROB: Final = "Natural logarithm of the token's probability, before any sampling parameter."
_TOKEN_NAME: Final = (
    "Unique name of the token: its text; bytes:\\xe4 if that is not a whole character; token_id:7 "
    "if another token has the same text."
)
_PROMPT_LOGPROBS: Final = (
    "Return the log-probability of every token of the prompt, and this many of the most likely "
    "tokens. The prompt is then not taken from the prefix cache. Not allowed with stream."
)
_PROMPT_ENTRIES: Final = (
    "If requested, one entry per token of the prompt, null for the first: by token id the token "
    "itself, then the most likely ones."
)
_MS: Final = "null if no token was generated."

# By name of the field, or by `Struct.field` where the Structs differ.
DESCRIPTIONS: Final[Mapping[str, str]] = {
    # Fields of both generation requests.
    "model": f"{_MODEL} Default: the model that is served.",
    "max_tokens": "Most tokens to generate per choice; 0 computes the prompt only. Default: 16 for "
    "/v1/completions; for chats as many as the context has room for.",
    "temperature": "Divides the logits before sampling. 0 takes the most likely token; otherwise "
    f"at least 0.01. {_RECOMMENDED}, else 1.",
    "top_p": "Sample among the fewest most likely tokens whose probabilities add up to this. "
    f"{_RECOMMENDED}, else 1, all tokens.",
    "top_k": "Sample among this many most likely tokens, at most the size of the vocabulary. "
    f"0 and -1: all tokens. {_RECOMMENDED}, else 0.",
    "min_p": "Leave out tokens less likely than this share of the most likely one. "
    f"{_RECOMMENDED}, else 0, all tokens.",
    "presence_penalty": "Subtracted from the logit of every token that the answer already has. "
    "Default: 0.",
    "frequency_penalty": "Subtracted from the logit of a token, once for each of its occurrences "
    "in the answer. Default: 0.",
    "repetition_penalty": "Divides the positive logits, and multiplies the negative ones, of "
    "tokens in prompt and answer; above 1 discourages repetition. "
    f"{_RECOMMENDED}, else 1.",
    "logit_bias": "Numbers to add to the logits of single tokens, from -100 to 100, by token id "
    "(as a string).",
    "min_tokens": "Tokens to generate before an end token or a stop may end the answer; at most "
    "max_tokens. Default: 0.",
    "stop": "The answer ends before this text, or before the first of these texts.",
    "stop_token_ids": "The answer ends at each of these token ids.",
    "ignore_eos": "Continue after the model's end tokens. Default: false.",
    "seed": "Seed of the sampler's noise. The same request with the same seed gets the same "
    "tokens. Default: a random one.",
    "n": "Number of choices per prompt. Default: 1.",
    "stream": "Send the answer in parts, as server-sent events. Default: false.",
    "stream_options": "What the events contain. Only allowed with stream.",
    "include_stop_str_in_output": "The text ends after the stop text instead of before it. "
    "Default: false.",
    "skip_special_tokens": "Leave control tokens out of the text. Default: true.",
    "ChatRequest.prompt_logprobs": _PROMPT_LOGPROBS,
    "CompletionRequest.prompt_logprobs": _PROMPT_LOGPROBS,
    "return_token_ids": "Return the token ids of prompt and answer. Default: false.",
    "return_drafter_ids": "Return which drafter proposed each token. Default: false.",
    "speculation": "Settings of speculative decoding for this request. They affect the speed, "
    "never the answer.",
    "prediction": "Text that the answer probably contains. Tokens are also drafted from it, which "
    "affects the speed, never the answer.",
    "cache_salt": "Cached prompts are shared only between requests of the same salt and the same "
    "API key. Default: no salt.",
    "priority": "Of the waiting requests of an API key, the highest number runs first. Default: 0.",
    "request_timeout": "Seconds from the arrival of the request to its end; after them it fails "
    "with 408. At most the server's own limit, which is the default.",
    "user": _NO_EFFECT,
    "safety_identifier": _NO_EFFECT,
    "prompt_cache_key": _NO_EFFECT,
    "service_tier": _NO_EFFECT,
    "metadata": _NO_EFFECT,
    "StreamOptions.include_usage": "Send a last event without choices that holds the usage. "
    "Default: false.",
    "StreamOptions.continuous_usage_stats": "Put the usage so far into every event. "
    "Default: false.",
    "StreamOptions.include_obfuscation": "Pad the JSON of every event to a multiple of 512 bytes, "
    "which hides the lengths of the texts. Default: false.",
    "SpeculationOptions.enabled": "Whether to draft; false decodes plainly. Default: true.",
    "SpeculationOptions.max_nodes": "Most nodes of a draft tree, its root included. Default and "
    "upper limit: max_nodes of /v1/speculation.",
    "SpeculationOptions.drafters": "Names of the drafters to use, of those in /v1/speculation. "
    "Default: all.",
    "Prediction.type": "The kind of prediction.",
    "Prediction.content": "The expected text, whole or in parts that are joined; not empty.",
    "TextPart.type": "The kind of part.",
    "TextPart.text": "The text of the part.",
    # Chat requests.
    "messages": "The chat so far, oldest message first.",
    "Message.role": "Who wrote the message.",
    "Message.content": "The text of the message, whole or in parts that are joined; may be null "
    "beside tool calls.",
    "Message.tool_calls": "Calls that the assistant made, in OpenAI's form; the template must have "
    "a place for them.",
    "Message.tool_call_id": "Id of the call that a message of the role tool answers.",
    "tools": "Functions that the template shows to the model. Calling them is not supported yet, "
    "so tool_choice must be none.",
    "tool_choice": "none: the model writes text.",
    "chat_template_kwargs": "Variables for the model's chat template, such as enable_thinking; the "
    "template must have them.",
    "reasoning_effort": "The template's variable of this name.",
    "Message.name": "Name of the author, for templates that show it.",
    "max_completion_tokens": "The newer name of max_tokens.",
    "ChatRequest.logprobs": "Return the log-probability of every token. Default: false.",
    "ChatRequest.top_logprobs": "How many of the most likely tokens are listed at each token. Only "
    "allowed with logprobs. Default: 0.",
    "add_generation_prompt": "End the prompt with the header of the assistant's answer. Default: "
    "true, or false with continue_final_message.",
    "continue_final_message": "Continue the text of the last message instead of answering it. "
    "Default: false.",
    "store": "Answers are never stored.",
    # Completion requests.
    "CompletionRequest.prompt": "The text or the token ids to continue, or a list of either. With "
    "n choices each, a request has at most 128 choices.",
    "echo": "Begin the text of every choice with its prompt. Default: false.",
    "CompletionRequest.logprobs": "Return the log-probability of every token, with echo also of "
    "those of the prompt, and this many of the most likely tokens.",
    # Answers of both, and their chunks.
    "id": "Identifier of the answer; contains the request's X-Request-Id.",
    "object": "The kind of this object.",
    "created": "When it was created, in seconds since 1970 (UTC).",
    "choices": "The answers: n for each prompt. In a stream: those that this event continues.",
    "usage": "Token counts of the whole request. In a stream: null until the last event.",
    "metrics": "Times and speculation of the whole request. In a stream: in the last event only.",
    "prompt_token_ids": "Token ids of the prompt, if return_token_ids is set.",
    "obfuscation": "Padding, if include_obfuscation is set. Ignore it.",
    "ChatCompletion.prompt_logprobs": _PROMPT_ENTRIES,
    "CompletionChoice.prompt_logprobs": _PROMPT_ENTRIES,
    "rank": "1 for the most likely token; null for a token of the prompt that is not among the "
    "most likely ones that were requested.",
    "decoded_token": _TOKEN_NAME,
    "index": "Number of the choice: prompt * n + sample.",
    "message": "The answer.",
    "delta": "What this event adds to the answer.",
    "text": "The generated text. In a stream: the part of it that this event adds.",
    "finish_reason": "Why the choice ended: stop (an end token or a stop), length (max_tokens or "
    "the context is reached), abort or error. In a stream: null until it ends.",
    "stop_reason": "The stop text or the stop token id that ended the choice, else null.",
    "token_ids": "Ids of the generated tokens, if return_token_ids is set.",
    "drafter_ids": "For each generated token the drafter that proposed it, if return_drafter_ids "
    "is set: 0 the model itself, 255 the request's prediction, else 1 + its index in the drafters "
    "of /v1/speculation.",
    "role": "The author of the answer.",
    "ChatMessage.content": "The generated text.",
    "ChatDelta.content": "The next part of the generated text.",
    "refusal": "Always null.",
    "logprobs": "Log-probabilities of the generated tokens, if requested.",
    "ChatLogprobs.content": "One entry per token.",
    "token": _TOKEN_NAME,
    "logprob": _LOGPROB,
    "bytes": "The bytes of the token, in UTF-8.",
    "TokenLogprob.top_logprobs": "The most likely tokens at this position, best first.",
    "CompletionLogprobs.tokens": _TOKEN_NAME,
    "token_logprobs": f"One per token, null for the first token of the prompt. {_LOGPROB}",
    "CompletionLogprobs.top_logprobs": "For each token the log-probabilities of the most likely "
    "tokens at its position and of the token itself, by name.",
    "text_offset": "For each token the character of the choice's text at which it begins; the end "
    "of the text if a stop text cut it off.",
    "prompt_tokens": "Tokens of all prompts.",
    "completion_tokens": "Generated tokens of all choices.",
    "total_tokens": "The sum of both.",
    "prompt_tokens_details": "More about the prompt tokens.",
    "completion_tokens_details": "More about the generated tokens, if the request has a "
    "prediction.",
    "cached_tokens": "Prompt tokens whose keys and values were found in the prefix cache.",
    "accepted_prediction_tokens": "Tokens of the prediction that the answer contains.",
    "rejected_prediction_tokens": "The other tokens of the prediction.",
    "time_to_first_token_ms": f"Milliseconds from the arrival to the first token; {_MS}",
    "generation_time_ms": f"Milliseconds from the first token to the last one; {_MS}",
    "queue_time_ms": "Milliseconds from the arrival until the engine took the request.",
    "mean_itl_ms": "Milliseconds between two groups of tokens that were sent together, on "
    "average; null if there was one group.",
    "tokens_per_second": "Generated tokens per second since the arrival; null if there was one "
    "group of tokens.",
    "speculative_decoding": "Speculative decoding in this request.",
    "SpeculativeDecoding.mean_acceptance_length": "Generated tokens per verification, the one that "
    "the model adds included; 1 without speculation, 0 if nothing ran.",
    "draft_acceptance_rate": "num_accepted_draft_tokens / num_draft_tokens, or 0.",
    "acceptance_histogram": "Entry a counts the verifications that accepted a drafted tokens.",
    "num_spec_steps": "Verifications: forward passes, counted once for each choice in them.",
    "num_accepted_draft_tokens": "Drafted tokens that were accepted.",
    "num_draft_tokens": "Drafted tokens (nodes of the trees) that were verified.",
    "num_spec_tokens": "Most drafted tokens that one verification can accept.",
    # Other routes.
    "data": "The one model that is served.",
    "Model.id": _MODEL,
    "owned_by": "The program that serves the model.",
    "root": "Name of the model.",
    "default_sampling_params": "What a request gets that does not give these fields. They come "
    "from generation_config.json, unless the server was started with --generation-config none.",
    "max_model_len": "Tokens of the context: prompt and answer together.",
    "TokenizeRequest.prompt": "The text. Send exactly one of prompt and messages.",
    "TokenizeRequest.messages": "The chat. Send exactly one of prompt and messages.",
    "TokenizeRequest.add_generation_prompt": "End the chat with the header of the assistant's "
    "answer. Has no effect with continue_final_message.",
    "TokenizeRequest.continue_final_message": "Leave the last message of the chat open.",
    "add_special_tokens": "Add the tokens that the tokenizer adds to a text, such as one for its "
    "beginning. Has no effect on chats.",
    "return_token_strs": "Return the names of the tokens, too.",
    "count": "Number of tokens.",
    "tokens": "The token ids.",
    "token_strs": f"If return_token_strs is set, for each token: {_TOKEN_NAME}",
    "DetokenizeResponse.prompt": "The text of the tokens, control tokens included.",
    "status": "ok, or failed if the engine cannot be started.",
    "engine": "State of the engine: starting, ready, restarting, failed or stopped.",
    "ready": "Whether a request would be accepted now.",
    "reason": "Why not, else null.",
    "version": "Version of specserve.",
    "requests": "Which requests are counted: all, or own (the finished ones of the caller's key) "
    "for a key without the scope metrics.",
    "drafters": "Names of the drafters, in the order of drafter_ids.",
    "exactness": "exact: a token never depends on what else is in its forward pass; fast: it may, "
    "where two tokens are about equally likely.",
    "max_nodes": "Most nodes of a draft tree, its root included.",
    "num_running": "Sequences that run now.",
    "num_drafts": "Verifications with at least one drafted token.",
    "num_accepted_tokens": "Drafted tokens that were accepted.",
    "mean_acceptance_length": "1 + num_accepted_tokens / num_drafts.",
    "by_drafter": "The same by drafter, and for predictions; only if all requests are counted.",
    "name": "Name of the drafter.",
    "active": "False if it was switched off after repeated failures.",
    "num_failures": "Its calls that failed. A request for which it fails is decoded without it.",
    "num_proposed": "Tokens it proposed, before the trees of several drafters were merged.",
    "num_verified": "Its proposed tokens that were verified.",
    "num_accepted": "Its proposed tokens that were accepted.",
    "acceptance_rate": "num_accepted / num_verified, or 0.",
    "verified_by_depth": "num_verified by depth in the tree; the first entry is depth 1.",
    "accepted_by_depth": "num_accepted by depth in the tree; the first entry is depth 1.",
    "error": "What is wrong.",
    "ErrorDetail.message": "What is wrong, with the value and the fix; at most 503 characters.",
    "type": "The kind of error, which follows from the status.",
    "param": "The field that is wrong, or null.",
    "code": "A fixed name of the error, such as model_not_found, or null.",
}
