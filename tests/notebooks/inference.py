# A finished run answers several prompts, and becomes files for other programs. The adapter was
# trained before; here it lies in the folder `adapter`.

# %% The adapter's folder names its base
from minitune import FastLanguageModel, TextIteratorStreamer, TextStreamer

model, tokenizer = FastLanguageModel.from_pretrained("adapter", max_seq_length=256)
FastLanguageModel.for_inference(model)

# %% Several prompts at once
tokenizer.pad_token = tokenizer.eos_token
tokenizer.padding_side = "left"
prompts = ["3 lamps", "Twelve blue lamps go to Lisbon on Friday"]
batch = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
outputs = model.generate(
    **batch, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id
)
new_tokens = outputs[:, batch["input_ids"].shape[1] :]
answers = tokenizer.batch_decode(new_tokens, skip_special_tokens=True)

# %% One after the other
alone = []
for prompt in prompts:
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
    alone.append(tokenizer.decode(output[inputs.input_ids.shape[1] :], skip_special_tokens=True))

# %% A conversation, streamed
messages = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "3 lamps to Oslo"},
]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
_ = model.generate(input_ids=ids, streamer=streamer, max_new_tokens=8)

# %% The same in a thread, as for a web page
from threading import Thread

pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
thread = Thread(
    target=model.generate, kwargs={"input_ids": ids, "streamer": pieces, "max_new_tokens": 8}
)
thread.start()
streamed = "".join(pieces)
thread.join()

# %% The base's answer beside it
with model.disable_adapter():
    base_output = model.generate(input_ids=ids, max_new_tokens=8)

# %% Another adapter on the same base
model.load_adapter("other_adapter")

# %% Files
model.save_pretrained_merged("merged", tokenizer, save_method="merged_16bit")
model.save_pretrained_gguf("gguf", tokenizer, quantization_method="q8_0")
