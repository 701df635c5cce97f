import pytest, nst_helpers as nst
from conftest import *
@pytest.mark.parametrize(("p","s"),[("china","starry_night"),("chelsea","stained_glass")])
@pytest.mark.parametrize("o",["adam","lbfgs"])
def test_probe(vgg,pictures,p,s,o):
    c,st=nst.shrink_to(pictures[p],96),nst.shrink_to(pictures[s],96)
    r=paint(c,st,vgg,optimizer=o,content_weight=2.5,style_weight=30,num_steps=40)
    u=nst.resize(pictures["chelsea" if p=="china" else "china"],c.shape[2:])
    t=nst.recolor(c,[st],[],TINY); v=nst.recolor(u,[st],[],TINY)
    print("PROBE",p,o,"raw",content_loss(r,c,vgg),"<",content_loss(u,c,vgg),"| palette",content_loss(r,t,vgg),"<",content_loss(v,t,vgg),"style",style_loss(r,st,vgg),style_loss(c,st,vgg),style_loss(t,st,vgg))
