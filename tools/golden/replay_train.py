"""Replays a training golden with PEFT from the values in the file, to tell what its own storage costs.

python tools/golden/replay_train.py MODEL_FOLDER GOLDEN_FOLDER lora_conv_ff
"""
import torch, json, sys
from safetensors.torch import load_file
from safetensors import safe_open
from diffusers import UNet2DConditionModel, DDPMScheduler
from peft import LoraConfig, get_peft_model
torch.set_num_threads(1)
name=sys.argv[3]
G=sys.argv[2]+'/'
f=G+f'train_{name}.safetensors'
t=load_file(f); d=load_file(G+'train_data.safetensors')
with safe_open(f,'pt') as h: cfg=json.loads(h.metadata()['config'])
u=UNet2DConditionModel.from_pretrained(sys.argv[1],subfolder='unet',torch_dtype=torch.float32)
c=LoraConfig(r=cfg['r'],lora_alpha=cfg['lora_alpha'],target_modules=cfg['target_modules'],init_lora_weights=True)
m=get_peft_model(u,c)
P={k:p for k,p in m.named_parameters() if p.requires_grad}
for k,p in P.items(): p.data.copy_(t['init.'+k].float())
s=DDPMScheduler(beta_start=0.00085,beta_end=0.012,beta_schedule='scaled_linear',num_train_timesteps=1000)
o=torch.optim.AdamW(P.values(),lr=1e-3,weight_decay=0.01)
L=[]
for i in range(6):
    x=s.add_noise(d[f'latents.{i}'],d[f'noise.{i}'],d[f'timesteps.{i}'].long())
    out=m(x,d[f'timesteps.{i}'].long(),d['context']).sample
    loss=torch.nn.functional.mse_loss(out,d[f'noise.{i}']); o.zero_grad(); loss.backward()
    if i==0:
        e=[((p.grad-t['grad0.'+k].float()).norm()/t['grad0.'+k].float().norm()).item() for k,p in P.items()]
        print('grad0 worst',max(e), sum(v>5e-3 for v in e))
    o.step(); L.append(loss.item())
print((torch.tensor(L,dtype=torch.float64)-t['losses']).abs().max())
e={k:((p.data-t['final.'+k].float()).norm()/t['final.'+k].float().norm()).item() for k,p in P.items()}
print('final worst',max(e.values()), sum(v>5e-3 for v in e.values()), len(e))
